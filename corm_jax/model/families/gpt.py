"""Families with LayerNorm and biases: GPT-2, GPT-NeoX (Pythia), OPT, BLOOM."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from corm_jax.model.families.family import ACTIVATIONS, Activation, Family, head_size
from corm_jax.model.families.rotary import Rotated
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, missing
from corm_jax.model.transformer import Config

BIASES: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "feed_forward_bias": True}
QKV = ("attention.q", "attention.k", "attention.v")


class GPT2(Family):
    """GPT-2: learned positions, q, k, v in one tensor, matrices as ``[in, out]``."""

    model_type: Literal["gpt2"]
    architectures: list[Literal["GPT2LMHeadModel"]] | None = None
    vocab_size: Count
    n_positions: Count
    n_embd: Count
    n_layer: Count
    n_head: Count
    n_inner: Count | None = None
    activation_function: Activation = missing("gelu_new")
    layer_norm_epsilon: Number = missing(1e-5)
    tie_word_embeddings: bool = missing(True)

    names: ClassVar[Names] = Names(
        {
            "embedding": "transformer.wte",
            "learned": "transformer.wpe",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        {
            "attention_norm": "ln_1",
            "attention.out": "attn.c_proj",
            "feed_forward_norm": "ln_2",
            "feed_forward.up": "mlp.c_fc",
            "feed_forward.down": "mlp.c_proj",
        },
        "transformer.h.{}.",
        fused={"attn.c_attn": QKV},
        inputs_first=True,
    )
    base: ClassVar[str] = "transformer."
    buffers: ClassVar[re.Pattern | None] = re.compile(r"\.attn\.(masked_)?bias$")
    own_harmless: ClassVar[frozenset[str]] = frozenset(
        [
            "n_ctx",
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ]
    )
    only: ClassVar[dict[str, tuple]] = {
        **Family.only,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }

    @model_validator(mode="after")
    def _shape(self) -> "GPT2":
        head_size(self.n_embd, self.n_head, "n_embd n_head")
        return self

    def config(self) -> Config:
        return Config(
            vocab=self.vocab_size,
            dim=self.n_embd,
            hidden=self.n_inner or 4 * self.n_embd,
            layers=self.n_layer,
            heads=self.n_head,
            kv_heads=self.n_head,
            head_dim=self.n_embd // self.n_head,
            context=self.n_positions,
            norm="layer",
            norm_eps=self.layer_norm_epsilon,
            activation=ACTIVATIONS[self.activation_function],
            gated=False,
            rope=None,
            learned=True,
            tied=self.tie_word_embeddings,
            **BIASES,
        )

    def assumed(self) -> dict[str, Any]:
        return self._unsaid("layer_norm_epsilon", "activation_function")


class GPTNeoX(Rotated):
    """GPT-NeoX and Pythia: a part of each head is rotated, attention and feed-forward side by side."""

    model_type: Literal["gpt_neox"]
    architectures: list[Literal["GPTNeoXForCausalLM"]] | None = None
    hidden_act: Activation = missing("gelu")
    layer_norm_eps: Number = missing(1e-5)
    use_parallel_residual: bool = missing(True)
    attention_bias: bool = missing(True)
    tie_word_embeddings: bool = missing(False)
    rotary_pct: float = Field(default=None, gt=0, le=1)  # pyright: ignore
    rotary_emb_base: Number = missing()

    names: ClassVar[Names] = Names(
        {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
        {
            "attention_norm": "input_layernorm",
            "attention.out": "attention.dense",
            "feed_forward_norm": "post_attention_layernorm",
            "feed_forward.up": "mlp.dense_h_to_4h",
            "feed_forward.down": "mlp.dense_4h_to_h",
        },
        "gpt_neox.layers.{}.",
        fused={"attention.query_key_value": QKV},
        by_head=True,
    )
    base: ClassVar[str] = "gpt_neox."
    rotates_part: ClassVar[bool] = True
    buffers: ClassVar[re.Pattern | None] = re.compile(r"\.attention\.(masked_)?bias$")

    @model_validator(mode="after")
    def _all_heads_alike(self) -> "GPTNeoX":
        size = head_size(self.hidden_size, self.num_attention_heads)
        for key, only in (("head_dim", size), ("num_key_value_heads", self.num_attention_heads)):
            if getattr(self, key) not in (None, only):
                raise ValueError(f"{key!r} = {getattr(self, key)} is not supported: only {only} is")
        return self

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """``rotary_pct`` and ``rotary_emb_base`` are what other families call otherwise; 0.25 is the default."""
        found = dict(fields)
        given = (found.get("rope_parameters"), found.get("rope_scaling"))
        inside = next((one for one in given if one and isinstance(one, dict)), {})
        for old, new, default in (
            ("rotary_pct", "partial_rotary_factor", 0.25),
            ("rotary_emb_base", "rope_theta", None),
        ):
            if old in found and new in found and found[old] != found[new]:
                raise ValueError(f"{old!r} = {found[old]} and {new!r} = {found[new]} contradict each other")
            value = found.get(old, found.get(new, default))
            if value is not None and not (new in inside and old not in found):
                found[new] = value
        return found

    def config(self) -> Config:
        return Config(
            vocab=self.vocab_size,
            dim=self.hidden_size,
            hidden=self.intermediate_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_attention_heads,
            head_dim=self.width,
            context=self.max_position_embeddings,
            norm="layer",
            norm_eps=self.layer_norm_eps,
            parallel=self.use_parallel_residual,
            activation=ACTIVATIONS[self.hidden_act],
            gated=False,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            feed_forward_bias=True,
            rope=self.rope,
            tied=self.tie_word_embeddings,
        )

    def assumed(self) -> dict[str, Any]:
        return self._unsaid("layer_norm_eps", "max_position_embeddings", "use_parallel_residual")


class OPT(Family):
    """OPT: learned positions, ReLU. OPT-350m, which normalises afterwards and projects its embedding, is refused."""

    model_type: Literal["opt"]
    architectures: list[Literal["OPTForCausalLM"]] | None = None
    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    ffn_dim: Count
    max_position_embeddings: Count
    activation_function: Activation = missing("relu")
    word_embed_proj_dim: Count | None = None
    enable_bias: bool = missing(True)
    tie_word_embeddings: bool = missing(True)

    names: ClassVar[Names] = Names(
        {
            "embedding": "model.decoder.embed_tokens",
            "learned": "model.decoder.embed_positions",
            "norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
        },
        {
            "attention_norm": "self_attn_layer_norm",
            "attention.q": "self_attn.q_proj",
            "attention.k": "self_attn.k_proj",
            "attention.v": "self_attn.v_proj",
            "attention.out": "self_attn.out_proj",
            "feed_forward_norm": "final_layer_norm",
            "feed_forward.up": "fc1",
            "feed_forward.down": "fc2",
        },
        "model.decoder.layers.{}.",
        padding=2,
    )
    only: ClassVar[dict[str, tuple]] = {
        **Family.only,
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    }

    @model_validator(mode="after")
    def _shape(self) -> "OPT":
        head_size(self.hidden_size, self.num_attention_heads)
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise ValueError(
                f"'word_embed_proj_dim' = {self.word_embed_proj_dim} is not 'hidden_size' = {self.hidden_size}: "
                "embeddings that are projected are not read"
            )
        return self

    def config(self) -> Config:
        biases: dict[str, Any] = dict.fromkeys(BIASES, self.enable_bias)
        return Config(
            vocab=self.vocab_size,
            dim=self.hidden_size,
            hidden=self.ffn_dim,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            context=self.max_position_embeddings,
            norm="layer",
            norm_eps=1e-5,
            activation=ACTIVATIONS[self.activation_function],
            gated=False,
            rope=None,
            learned=True,
            tied=self.tie_word_embeddings,
            **biases,
        )


class Bloom(Family):
    """BLOOM: ALiBi, a norm of the embedding, q, k, v in one tensor, head by head."""

    model_type: Literal["bloom"]
    architectures: list[Literal["BloomForCausalLM"]] | None = None
    vocab_size: Count
    hidden_size: Count = missing()
    n_embed: Count | None = None
    n_layer: Count = missing()
    num_hidden_layers: Count = missing()
    n_head: Count = missing()
    num_attention_heads: Count = missing()
    seq_length: Count = missing(2048)
    layer_norm_epsilon: Number = missing(1e-5)
    tie_word_embeddings: bool = missing(True)

    names: ClassVar[Names] = Names(
        {
            "embedding": "transformer.word_embeddings",
            "embedding_norm": "transformer.word_embeddings_layernorm",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        {
            "attention_norm": "input_layernorm",
            "attention.out": "self_attention.dense",
            "feed_forward_norm": "post_attention_layernorm",
            "feed_forward.up": "mlp.dense_h_to_4h",
            "feed_forward.down": "mlp.dense_4h_to_h",
        },
        "transformer.h.{}.",
        fused={"self_attention.query_key_value": QKV},
        by_head=True,
    )
    base: ClassVar[str] = "transformer."
    own_harmless: ClassVar[frozenset[str]] = frozenset(
        [
            "slow_but_exact",
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "n_inner",
            "offset_alibi",
            "skip_bias_add",
            "skip_bias_add_qkv",
        ]
    )
    only: ClassVar[dict[str, tuple]] = {**Family.only, "apply_residual_connection_post_layernorm": (False,)}

    @model_validator(mode="after")
    def _shape(self) -> "Bloom":
        dim, _, heads = self.sizes
        head_size(dim, heads, "hidden_size num_attention_heads" if self.n_head is None else "hidden_size n_head")
        return self

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The width, layers and heads, each of which has two names."""
        found = []
        for old, new in (
            ("n_embed", "hidden_size"),
            ("n_layer", "num_hidden_layers"),
            ("n_head", "num_attention_heads"),
        ):
            values = {key: value for key in (old, new) if (value := getattr(self, key)) is not None}
            if not values:
                raise ValueError(f"{new!r} is missing")
            if len(set(values.values())) > 1:
                raise ValueError(f"{old!r} and {new!r} contradict each other: {values}")
            found += set(values.values())
        return tuple(found)  # pyright: ignore

    def config(self) -> Config:
        dim, layers, heads = self.sizes
        return Config(
            vocab=self.vocab_size,
            dim=dim,
            hidden=4 * dim,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=dim // heads,
            context=self.seq_length,
            norm="layer",
            norm_eps=self.layer_norm_epsilon,
            activation="gelu_tanh",
            gated=False,
            rope=None,
            alibi=True,
            embedding_norm=True,
            tied=self.tie_word_embeddings,
            **BIASES,
        )

    def assumed(self) -> dict[str, Any]:
        return self._unsaid("layer_norm_epsilon")
