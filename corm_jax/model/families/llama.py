"""LLaMA and the families that differ little from it: Mistral, Qwen 2, Qwen 3, Phi-3."""

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from corm_jax.model.families.family import ACTIVATIONS, Activation, Family, kinds_of, windows
from corm_jax.model.families.rotary import Rotated
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, missing
from corm_jax.model.transformer import Config

MODEL = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
LAYERS = "model.layers.{}."


class _Llamas(Rotated):
    hidden_act: Activation = missing("silu")
    rms_norm_eps: Number = missing(1e-6)
    tie_word_embeddings: bool = missing(False)

    names: ClassVar[Names] = Names(MODEL, LAYER, LAYERS)
    only: ClassVar[dict[str, tuple]] = {**Family.only, "rope_interleaved": (False,)}

    def config(self) -> Config:
        return Config(
            vocab=self.vocab_size,
            dim=self.hidden_size,
            hidden=self.intermediate_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.width,
            context=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            activation=ACTIVATIONS[self.hidden_act],
            rope=self.rope,
            tied=self.tie_word_embeddings,
            **self.own(),
        )

    def own(self) -> dict[str, Any]:
        """What the family has of its own."""
        return {}

    def assumed(self) -> dict[str, Any]:
        parts = [part for part in (self.rope_scaling, self.rope_parameters) if part]
        said = any("rope_theta" in part.model_fields_set for part in (self, *parts))
        theta = {} if said else {"rope_theta": self.rope.theta}
        return self._unsaid("rms_norm_eps", "max_position_embeddings") | theta


class Llama(_Llamas):
    """Llama 2 and 3, Vicuna, SmolLM2."""

    model_type: Literal["llama"]
    architectures: list[Literal["LlamaForCausalLM"]] | None = None
    attention_bias: bool = missing(False)
    mlp_bias: bool = missing(False)

    only: ClassVar[dict[str, tuple]] = {**_Llamas.only, "use_sliding_window": (False,)}

    def own(self) -> dict[str, Any]:
        bias = {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias}
        return {**bias, "feed_forward_bias": self.mlp_bias}


class Mistral(_Llamas):
    """Mistral 7B and its kin: a LLaMA, in version 0.1 with a window in all layers."""

    model_type: Literal["mistral"]
    architectures: list[Literal["MistralForCausalLM"]] | None = None
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = missing(131072)
    sliding_window: Count | None = 4096

    def own(self) -> dict[str, Any]:
        return {"windows": windows(None, self.sliding_window, self.num_hidden_layers)}

    def assumed(self) -> dict[str, Any]:
        return super().assumed() | self._unsaid("sliding_window", "num_key_value_heads")


class _Qwen(_Llamas):
    use_sliding_window: bool = missing(False)
    sliding_window: Count | None = 4096
    max_window_layers: int = missing(28)
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    max_position_embeddings: Count = missing(32768)
    num_key_value_heads: Count | None = 32

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer: from ``layer_types``, or of those from ``max_window_layers`` on."""
        layers, window = self.num_hidden_layers, self.sliding_window if self.use_sliding_window else None
        kinds = self.layer_types
        if kinds is None:
            kinds = kinds_of(layers, lambda i: window is not None and i >= self.max_window_layers)
        return windows(kinds, window, layers)

    @model_validator(mode="after")
    def _windows(self) -> "_Qwen":
        _ = self.windows
        return self

    def assumed(self) -> dict[str, Any]:
        return super().assumed() | self._unsaid("num_key_value_heads")


class Qwen2(_Qwen):
    """Qwen 2 and 2.5: queries, keys and values have a bias."""

    model_type: Literal["qwen2"]
    architectures: list[Literal["Qwen2ForCausalLM"]] | None = None

    def own(self) -> dict[str, Any]:
        return {"windows": self.windows, "qkv_bias": True}


class Qwen3(_Qwen):
    """Qwen 3: queries and keys are normalised."""

    model_type: Literal["qwen3"]
    architectures: list[Literal["Qwen3ForCausalLM"]] | None = None
    head_dim: Count | None = 128
    attention_bias: bool = missing(False)

    names: ClassVar[Names] = Names(MODEL, LAYER | NORMS, LAYERS)

    def own(self) -> dict[str, Any]:
        bias = {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias}
        return {"windows": self.windows, "qk_norm": True, **bias}

    def assumed(self) -> dict[str, Any]:
        return super().assumed() | self._unsaid("head_dim")


class Phi3(_Llamas):
    """Phi-3 and Phi-4-mini: q, k, v in one tensor, gate and up in one; LongRoPE."""

    model_type: Literal["phi3"]
    architectures: list[Literal["Phi3ForCausalLM"]] | None = None
    max_position_embeddings: Count = missing(4096)
    rms_norm_eps: Number = missing(1e-5)
    sliding_window: Count | None = None

    names: ClassVar[Names] = Names(
        MODEL,
        LAYER,
        LAYERS,
        fused={
            "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
            "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.up"),
        },
    )
    rotates_part: ClassVar[bool] = True
    says_original: ClassVar[bool] = True
    only: ClassVar[dict[str, tuple]] = {**_Llamas.only, "attention_bias": (False,), "lm_head_bias": (False,)}

    def own(self) -> dict[str, Any]:
        return {"windows": windows(None, self.sliding_window, self.num_hidden_layers)}
