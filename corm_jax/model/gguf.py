"""GGUF files (llama.cpp) as a checkpoint, dequantised to float32.

Two things differ from Hugging Face. The rows of q and k are stored for interleaved pairs (x_0, x_1), (x_2, x_3), ...
where ours and Hugging Face's are (x_0, x_{d/2}), ...; they are put back. And Llama 3's frequency scaling comes as a
tensor of divisors rather than as parameters.

Every key of the metadata is used as llama.cpp uses it for its architecture ``llama``, describes the file, belongs to
the tokenizer, or is refused by name. So is every tensor.
"""

import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from corm_jax.core.positions import Rope
from corm_jax.errors import CheckpointError
from corm_jax.files import first_error
from corm_jax.model.gguf_tokenizer import from_gguf
from corm_jax.model.llama import Config
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, Schema, missing
from corm_jax.model.source import Source, Tensor

NAMES = Names(
    {"embedding": "token_embd", "norm": "output_norm", "head": "output"},
    {
        "attention_norm": "attn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.out": "attn_output",
        "feed_forward_norm": "ffn_norm",
        "feed_forward.gate": "ffn_gate",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
    },
    "blk.{}.",
)
_DIVISORS = "rope_freqs.weight"
_WAY_OUT = "convert the model again, or load its Hugging Face directory"


def _factor(value: float) -> float:
    """A factor of linear scaling, in which llama.cpp takes 0 for none."""
    if value and not 1e-30 <= value <= 1e30:
        raise ValueError(f"must be a positive number, not {value!r}")
    return value or 1.0


Factor = Annotated[float, AfterValidator(_factor)]


class Metadata(Schema):
    """The metadata of a Llama. Field by field what llama.cpp means by it; its tokenizer reads its own part."""

    architecture: Literal["llama"] = Field(alias="general.architecture")
    type: Literal["model"] = missing("model", alias="general.type")
    quantization_version: Literal[2] = missing(2, alias="general.quantization_version")
    layers: Count = Field(alias="llama.block_count")
    context: Count = Field(alias="llama.context_length")
    dim: Count = Field(alias="llama.embedding_length")
    hidden: Count = Field(alias="llama.feed_forward_length")
    heads: Count = Field(alias="llama.attention.head_count")
    kv_heads: Count = missing(alias="llama.attention.head_count_kv")
    key_length: Count = missing(alias="llama.attention.key_length")
    value_length: Count = missing(alias="llama.attention.value_length")
    norm_eps: Number = Field(alias="llama.attention.layer_norm_rms_epsilon")
    vocab: Count = missing(alias="llama.vocab_size")
    theta: Number = missing(10000.0, alias="llama.rope.freq_base")
    rotated: Count = missing(alias="llama.rope.dimension_count")
    scaling: Literal["none", "linear"] = missing("linear", alias="llama.rope.scaling.type")
    factor: Factor = missing(alias="llama.rope.scaling.factor")
    scale_linear: Factor = missing(alias="llama.rope.scale_linear")

    only: ClassVar[dict[str, tuple]] = {
        "split.no": (0,),
        "split.count": (0, 1),
        "llama.expert_count": (0,),
        "llama.expert_used_count": (0,),
        "llama.attention.causal": (True,),
        "llama.attention.sliding_window": (0,),
        "llama.rope.scaling.attn_factor": (1,),
        "llama.tensor_data_layout": ("Meta AI original pth",),
    }

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        # What the file is called, who made it and how; what the reader or the tokenizer reads. Only YaRN uses the
        # original length, and no Llama is computed otherwise because it was fine-tuned.
        return key.startswith(("general.", "quantize.", "tokenizer.")) or key in (
            "GGUF.version",
            "GGUF.tensor_count",
            "GGUF.kv_count",
            "split.tensors.count",
            "llama.rope.scaling.original_context_length",
            "llama.rope.scaling.finetuned",
        )

    @model_validator(mode="before")
    @classmethod
    def _same_in_all_layers(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Some keys may have a list with a number for each layer: they are one number here."""
        found = dict(fields)
        for key in ("llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv"):
            value, layers = fields.get(key), fields.get("llama.block_count")
            if isinstance(value, list):
                if len(value) != layers or any(one != value[0] for one in value):
                    raise ValueError(f"{key!r} = {reprlib.repr(value)} is not one number for all {layers} layers")
                found[key] = value[0]
        return found

    @model_validator(mode="after")
    def _shape(self) -> "Metadata":
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"'llama.attention.head_count' = {self.heads} is no multiple of "
                f"'llama.attention.head_count_kv' = {self.kv_heads}"
            )
        if self.key_length is None and self.dim % self.heads:
            raise ValueError(
                f"'llama.embedding_length' = {self.dim} is no multiple of 'llama.attention.head_count' = {self.heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                "'llama.attention.key_length' (or else 'llama.embedding_length' / 'llama.attention.head_count') = "
                f"{self.head_dim} is odd: rotary positions turn pairs"
            )
        # llama.cpp takes what is not said from embedding_length, even where key_length differs from that.
        value_length = self.value_length or self.dim // self.heads
        for key, value in (
            ("llama.attention.value_length", value_length),
            ("llama.rope.dimension_count", self.rotated or self.head_dim),
        ):
            if value != self.head_dim:
                raise ValueError(f"{key!r} = {value} is not 'llama.attention.key_length' = {self.head_dim}")
        if None not in (self.factor, self.scale_linear) and self.factor != self.scale_linear:
            raise ValueError(
                f"'llama.rope.scaling.factor' = {self.factor} and 'llama.rope.scale_linear' = {self.scale_linear} "
                "contradict each other"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Numbers in the key of one head."""
        return self.key_length or self.dim // self.heads

    @property
    def linear(self) -> float:
        """The number by which every frequency is divided."""
        return 1.0 if self.scaling == "none" else self.factor or self.scale_linear or 1.0

    def rope(self, divisors: tuple[float, ...]) -> Rope:
        """The frequencies. Divisors of their own and a factor for all apply together, as in llama.cpp."""
        if divisors:
            return Rope(theta=self.theta, kind="divisors", divisors=tuple(self.linear * one for one in divisors))
        if self.linear != 1:
            return Rope(theta=self.theta, kind="linear", factor=self.linear)
        return Rope(theta=self.theta)


def open_gguf(path: Path, name: str) -> Source:
    """Opens a GGUF file of architecture ``llama``.

    Raises:
      CheckpointError: if the file is damaged, of another architecture, lacks a field or says something that the
        decoder does not do.
    """
    fields, tensors = _read(path)
    try:
        found = Metadata.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(f"the metadata of {path} cannot be used: {first_error(error)}: {_WAY_OUT}") from None
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing")
    rows, *rest = _shape(tensors["token_embd.weight"]) or (0,)
    if not rows or len(rest) != 1:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' has shape {(rows, *rest)}: it is no table of tokens")
    if found.vocab not in (None, rows):
        raise CheckpointError(f"{path}: 'llama.vocab_size' = {found.vocab}, but 'token_embd.weight' has {rows} rows")
    _check_kinds(path, tensors.values())
    divisors = _divisors(path, tensors.pop(_DIVISORS), found.head_dim) if _DIVISORS in tensors else ()
    config = Config(
        vocab=rows,
        dim=found.dim,
        hidden=found.hidden,
        layers=found.layers,
        heads=found.heads,
        kv_heads=found.kv_heads or found.heads,
        head_dim=found.head_dim,
        norm_eps=found.norm_eps,
        rope=found.rope(divisors),
        tied="output.weight" not in tensors,
        context=found.context,
    )
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    return Source(
        name,
        config,
        {
            key: Tensor(_shape(tensor), lambda tensor=tensor: _dequantise(tensor, heads))
            for key, tensor in tensors.items()
        },
        lambda: from_gguf(fields, path, rows),
        []
        if "theta" in found.model_fields_set
        else [f"{path} has no llama.rope.freq_base: {found.theta} is assumed, as llama.cpp does"],
        NAMES.places,
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata, and the tensors by name, of a file that is whole."""
    from gguf import GGUFEndian, GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader raises whatever indexing, reshaping or converting damaged bytes raises
        raise CheckpointError(f"{path} is truncated or damaged, fetch it again: {error or type(error)}") from None
    if reader.endianess != GGUFEndian.LITTLE:
        raise CheckpointError(f"{path} is big-endian, which is not supported: convert it with gguf_convert_endian.py")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise CheckpointError(f"{path} is damaged: tensor {tensor.name!r} lies over the one before it")
        end = tensor.data_offset + tensor.n_bytes
    if (left := reader.data.size - end) >= reader.alignment:
        raise CheckpointError(
            f"{path} is damaged: {left} bytes behind the last tensor belong to nothing "
            f"('general.alignment' = {reader.alignment})"
        )
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _check_kinds(path: Path, tensors: Iterable[Any]) -> None:
    """Raises for a type of numbers that cannot be dequantised."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    readable = {}
    for tensor in tensors:
        kind = tensor.tensor_type
        if kind not in readable:
            try:
                with np.errstate(all="ignore"):
                    dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
                readable[kind] = True
            except NotImplementedError:
                readable[kind] = False
        if not readable[kind]:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} has type {kind.name}, which is not supported: {_WAY_OUT}"
            )


def _divisors(path: Path, tensor: Any, head_dim: int) -> tuple[float, ...]:
    shape = _shape(tensor)
    if shape != (head_dim // 2,):
        raise CheckpointError(f"{path}: tensor {_DIVISORS!r} has shape {shape}, where {(head_dim // 2,)} is expected")
    values = tuple(_dequantise(tensor, {}).tolist())
    if bad := [value for value in values if not (value > 0 and math.isfinite(value))]:
        raise CheckpointError(f"{path}: tensor {_DIVISORS!r} holds {bad[0]}, and frequencies are divided by it")
    return values


def _shape(tensor: Any) -> tuple[int, ...]:
    """Axes in Hugging Face's order, which is the reverse of GGUF's."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantise(tensor: Any, heads: dict[str, int]) -> np.ndarray:
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # what comes out is checked for NaN and infinity
        value = dequantize(tensor.data, tensor.tensor_type)
    name = tensor.name.split(".")[-2]
    if name in heads:
        rows, columns = value.shape
        value = value.reshape(heads[name], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return value
