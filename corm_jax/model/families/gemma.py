"""Gemma 2 and 3: norms around attention and feed-forward, soft caps, local layers beside global ones."""

from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field, model_validator

from corm_jax.core.positions import Rope
from corm_jax.model.families.family import ACTIVATIONS, Activation, Family, kinds_of, windows
from corm_jax.model.families.llama import LAYER, LAYERS, MODEL, NORMS
from corm_jax.model.families.rotary import Rotated, Scaling
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, Schema, missing
from corm_jax.model.transformer import Config

_LAYER = LAYER | {
    "after_attention": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "after_feed_forward": "post_feedforward_layernorm",
}


class _Gemma(Rotated):
    num_key_value_heads: Count | None = 4
    head_dim: Count | None = 256
    hidden_activation: Activation = missing("gelu_pytorch_tanh")
    rms_norm_eps: Number = missing(1e-6)
    tie_word_embeddings: bool = missing(True)
    query_pre_attn_scalar: Number = missing(256.0)
    sliding_window: Count | None = 4096
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    final_logit_softcapping: Number | None = None
    attn_logit_softcapping: Number | None = None

    only: ClassVar[dict[str, tuple]] = {
        **Family.only,
        "attention_bias": (False,),
        "hidden_act": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
    }
    every: ClassVar[int] = 2
    """Every so many layers there is a global one."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        layers, kinds = self.num_hidden_layers, self.layer_types
        if kinds is None:
            kinds = kinds_of(layers, lambda i: (i + 1) % self.every != 0)
        return windows(kinds, self.sliding_window, layers)

    @model_validator(mode="after")
    def _windows(self) -> "_Gemma":
        _ = self.windows
        return self

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
            windows=self.windows,
            norm_eps=self.rms_norm_eps,
            norm_after=True,
            activation=ACTIVATIONS[self.hidden_activation],
            rope=self.rope,
            embedding_scale=self.hidden_size**0.5,
            attention_scale=self.query_pre_attn_scalar**-0.5,
            attention_softcap=self.attn_logit_softcapping,
            softcap=self.final_logit_softcapping,
            tied=self.tie_word_embeddings,
            **self.own(),
        )

    def own(self) -> dict[str, Any]:
        """What the family has of its own."""
        return {}

    def assumed(self) -> dict[str, Any]:
        return self._unsaid(
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "max_position_embeddings",
            "query_pre_attn_scalar",
            "sliding_window",
        )


class Gemma2(_Gemma):
    """Gemma 2: soft caps, every second layer global."""

    model_type: Literal["gemma2"]
    architectures: list[Literal["Gemma2ForCausalLM"]] | None = None
    max_position_embeddings: Count = missing(8192)
    final_logit_softcapping: Number | None = 30.0
    attn_logit_softcapping: Number | None = 50.0

    names: ClassVar[Names] = Names(MODEL, _LAYER, LAYERS, offset=1.0)

    def assumed(self) -> dict[str, Any]:
        said = {} if self.rope_parameters else self._unsaid("rope_theta")
        theta = {"rope_theta": self.rope.theta} if said else {}
        return super().assumed() | self._unsaid("final_logit_softcapping", "attn_logit_softcapping") | theta


class Scalings(Schema):
    """Gemma 3's ``rope_parameters``: those of its two kinds of layers."""

    full_attention: Scaling | None = None
    sliding_attention: Scaling | None = None


class Gemma3(_Gemma):
    """Gemma 3, its text models: normalised queries and keys, every sixth layer global, two rotary bases."""

    model_type: Literal["gemma3_text"]
    architectures: list[Literal["Gemma3ForCausalLM"]] | None = None
    max_position_embeddings: Count = missing(131072)
    rope_parameters: Scalings | None = None
    rope_local_base_freq: Number = missing()
    sliding_window_pattern: Count = Field(
        default=6, validation_alias=AliasChoices("sliding_window_pattern", "_sliding_window_pattern")
    )

    names: ClassVar[Names] = Names(MODEL, _LAYER | NORMS, LAYERS, offset=1.0)

    @property
    def every(self) -> int:  # pyright: ignore
        """Every so many layers there is a global one."""
        return self.sliding_window_pattern

    @property
    def rope(self) -> Rope:
        """Those of the global layers."""
        given = self.rope_parameters and self.rope_parameters.full_attention
        if given and self.rope_scaling:
            raise ValueError("'rope_parameters' and 'rope_scaling' are both there: keep one")
        rope = self._rope("rope_parameters.full_attention", given or self.rope_scaling or Scaling())
        unsaid = self.rope_theta is None and (given is None or given.rope_theta is None)
        return rope._replace(theta=1e6) if unsaid else rope

    @property
    def local_rope(self) -> Rope:
        """Those of the layers with a window."""
        given = (self.rope_parameters and self.rope_parameters.sliding_attention) or Scaling()
        theta, outside = given.rope_theta, self.rope_local_base_freq
        if theta is not None and outside is not None and theta != outside:
            raise ValueError(
                f"'rope_parameters.sliding_attention.rope_theta' = {theta} and 'rope_local_base_freq' = {outside} "
                "contradict each other"
            )
        if given.kind != "default":
            raise ValueError(
                f"'rope_parameters.sliding_attention' has rope type {given.kind!r}: only 'default' is read"
            )
        given.check("rope_parameters.sliding_attention", given.original_max_position_embeddings)
        return Rope(theta=theta or outside or 10000.0)

    @model_validator(mode="after")
    def _local(self) -> "Gemma3":
        if self.attn_logit_softcapping is not None:  # which transformers has in the config, and does not apply
            raise ValueError(f"'attn_logit_softcapping' = {self.attn_logit_softcapping} is not supported for Gemma 3")
        _ = self.local_rope
        return self

    def own(self) -> dict[str, Any]:
        return {"qk_norm": True, "local_rope": self.local_rope}
