"""What all architectures share: keys of the metadata, and how an architecture becomes a decoder's shape."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, model_validator

from corm_jax.core.positions import Rope
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, Schema, missing
from corm_jax.model.transformer import Config

MODEL = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
LAYER = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}
NORMS = {"attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm"}
LAYERS = "blk.{}."
QKV = {"attn_qkv": ("attention.q", "attention.k", "attention.v")}
"""GGUF's names of tensors."""

KEYS = {
    "layers": "block_count",
    "context": "context_length",
    "dim": "embedding_length",
    "hidden": "feed_forward_length",
    "vocab": "vocab_size",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "key_length": "attention.key_length",
    "value_length": "attention.value_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "window": "attention.sliding_window",
    "every": "attention.sliding_window_pattern",
    "attention_softcap": "attn_logit_softcapping",
    "softcap": "final_logit_softcapping",
    "parallel": "use_parallel_residual",
    "theta": "rope.freq_base",
    "local_theta": "rope.freq_base_swa",
    "rotated": "rope.dimension_count",
    "scaling": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "scale_linear": "rope.scale_linear",
    "amplitude": "rope.scaling.attn_factor",
    "original_context": "rope.scaling.original_context_length",
}
"""Fields, and their keys after the name of the architecture."""


def under(architecture: str) -> Callable[[str], str]:
    """Makes keys of fields: ``gemma3.block_count`` of ``layers``; other fields are about every file."""
    return lambda field: f"{architecture}.{KEYS[field]}" if field in KEYS else f"general.{field}"


def _factor(value: float) -> float:
    """A factor of linear scaling, in which llama.cpp takes 0 for none."""
    if value and not 1e-30 <= value <= 1e30:
        raise ValueError(f"must be a positive number, not {value!r}")
    return value or 1.0


Factor = Annotated[float, AfterValidator(_factor)]


class Architecture(Schema):
    """The metadata of a model. Field by field what llama.cpp means by it; the tokenizer reads its own part.

    Attributes:
      names: how the architecture calls its tensors.
      interleaved: whether rows of q and k are stored for pairs (x_0, x_1), (x_2, x_3), ... of a head, where the decoder
        and most architectures have (x_0, x_{d/2}), ...
      divisors: tensors that hold no parameters, but numbers by which the frequencies of positions are divided.
    """

    architecture: str
    type: Literal["model"] = missing("model")
    quantization_version: Literal[2] = missing(2)
    layers: Count
    context: Count
    dim: Count
    hidden: Count
    vocab: Count = missing()
    heads: Count
    kv_heads: Count = missing()
    key_length: Count = missing()
    value_length: Count = missing()

    names: ClassVar[Names]
    interleaved: ClassVar[bool] = False
    divisors: ClassVar[tuple[str, ...]] = ()

    only: ClassVar[dict[str, tuple]] = {
        "split.no": (0,),
        "split.count": (0, 1),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "attention.causal": (True,),
        "attention.sliding_window": (0,),
        "rope.scaling.attn_factor": (1,),
        "tensor_data_layout": ("Meta AI original pth",),
    }

    @classmethod
    def key(cls, field: str) -> str:
        """The key of a field."""
        return str(cls.model_fields[field].alias)

    @classmethod
    def short(cls, key: str) -> str:
        """A key without the name of the architecture, as `only` has it."""
        return key.removeprefix(cls.key("layers").removesuffix(KEYS["layers"]))

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        # What the file is called, who made it and how; what the reader or the tokenizer reads. Only YaRN and LongRoPE
        # use the original length, and nothing is computed otherwise because it was fine-tuned.
        return key.startswith(("general.", "quantize.", "tokenizer.")) or cls.short(key) in (
            "GGUF.version",
            "GGUF.tensor_count",
            "GGUF.kv_count",
            "split.tensors.count",
            "rope.scaling.original_context_length",
            "rope.scaling.finetuned",
        )

    @model_validator(mode="before")
    @classmethod
    def _same_in_all_layers(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Some keys may have a list with a number for each layer: they are one number here."""
        found = dict(fields)
        for key in map(cls.key, ("hidden", "heads", "kv_heads")):
            value, layers = fields.get(key), fields.get(cls.key("layers"))
            if isinstance(value, list):
                if len(value) != layers or any(one != value[0] for one in value):
                    raise ValueError(f"{key!r} = {reprlib.repr(value)} is not one number for all {layers} layers")
                found[key] = value[0]
        return found

    @model_validator(mode="after")
    def _shape(self) -> "Architecture":
        key = self.key
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{key('heads')!r} = {self.heads} is no multiple of {key('kv_heads')!r} = {self.kv_heads}")
        if self.key_length is None and self.dim % self.heads:
            raise ValueError(f"{key('dim')!r} = {self.dim} is no multiple of {key('heads')!r} = {self.heads}")
        # llama.cpp takes what is not said from embedding_length, even where key_length differs from that.
        value_length = self.value_length or self.dim // self.heads
        if value_length != self.head_dim:
            raise ValueError(f"{key('value_length')!r} = {value_length} is not {key('key_length')!r} = {self.head_dim}")
        return self

    @property
    def head_dim(self) -> int:
        """Numbers in the key of one head."""
        return self.key_length or self.dim // self.heads

    @property
    def turned(self) -> int:
        """How many numbers of a head are rotated."""
        return 0

    def config(self, vocab: int, tied: bool, divisors: Mapping[str, tuple[float, ...]]) -> Config:
        """The decoder's shape.

        Args:
          vocab: rows of the embedding.
          tied: whether there is no output matrix.
          divisors: those that the file has of the tensors `divisors`.
        """
        return Config(
            vocab=vocab,
            tied=tied,
            layers=self.layers,
            context=self.context,
            dim=self.dim,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim,
            **self.own(divisors),
        )

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        """What the architecture has of its own."""
        raise NotImplementedError

    def assumed(self) -> dict[str, Any]:
        """Numbers that the file does not say, with the values that llama.cpp takes instead."""
        return {}


class Rotated(Architecture):
    """An architecture with rotary positions."""

    theta: Number = missing(10000.0)
    rotated: Count = missing()
    scaling: Literal["none", "linear"] = missing("linear")
    factor: Factor = missing()
    scale_linear: Factor = missing()

    partly: ClassVar[bool] = False
    """Whether a part of each head may be left as it is."""

    @model_validator(mode="after")
    def _rotation(self) -> "Rotated":
        key, dim, turned = self.key, self.head_dim, self.turned
        if dim % 2:
            raise ValueError(
                f"{key('key_length')!r} (or else {key('dim')!r} / {key('heads')!r}) = {dim} is odd: rotary positions "
                "turn pairs"
            )
        if not self.partly and turned != dim:
            raise ValueError(f"{key('rotated')!r} = {turned} is not {key('key_length')!r} = {dim}")
        if turned > dim or turned % 2:
            raise ValueError(f"{key('rotated')!r} = {turned} is no even number up to {key('key_length')!r} = {dim}")
        if None not in (self.factor, self.scale_linear) and self.factor != self.scale_linear:
            raise ValueError(
                f"{key('factor')!r} = {self.factor} and {key('scale_linear')!r} = {self.scale_linear} "
                "contradict each other"
            )
        return self

    @property
    def turned(self) -> int:
        """How many numbers of a head are rotated."""
        return self.rotated or self.head_dim

    @property
    def linear(self) -> float:
        """The number by which every frequency is divided."""
        return 1.0 if self.scaling == "none" else self.factor or self.scale_linear or 1.0

    def rope(self, divisors: tuple[float, ...] = ()) -> Rope:
        """The frequencies. Divisors of their own and a factor for all apply together, as in llama.cpp."""
        share = math.nextafter(self.turned / self.head_dim, 1)  # int(head_dim * share) is turned, rounding or not
        rope = Rope(theta=self.theta, rotated=share)
        if divisors:
            return rope._replace(kind="divisors", divisors=tuple(self.linear * one for one in divisors))
        return rope._replace(kind="linear", factor=self.linear) if self.linear != 1 else rope

    def assumed(self) -> dict[str, Any]:
        return {} if "theta" in self.model_fields_set else {self.key("theta"): self.theta}
