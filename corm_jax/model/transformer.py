"""One decoder for all families, in Flax NNX. It holds parameters only: caches in, caches out.

    LLaMA            RMSNorm, rotary positions, grouped queries, SwiGLU
    Mistral, Phi-3   the same, with a window             Qwen   with biases, or norms of queries and keys
    Gemma            norms before and after, GeGLU, soft caps, layers with a window beside global ones
    GPT-NeoX         LayerNorm, a part of each head rotated, attention and feed-forward side by side
    BLOOM            LayerNorm, ALiBi, GELU              GPT-2, OPT   learned positions, GELU or ReLU

The module is a pytree, so it goes through `jax.jit` and `jax.vmap` as an argument like any other.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from corm_jax.core.arrays import broadcasts
from corm_jax.core.positions import ALiBi, Encoding, Hybrid, Rope
from corm_jax.model.decoder import Attend, Shape
from corm_jax.showing.brief import line

ACTIVATIONS = {
    "silu": nnx.silu,
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_tanh": partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
}


@dataclass(frozen=True, kw_only=True)
class Config(Shape):
    """The shape of the decoder, and what differs between families. By default a LLaMA.

    Attributes:
      dim: width of the hidden states.
      hidden: width of the feed-forward.
      norm: RMSNorm, or LayerNorm with a bias; ``norm_eps`` is added to the mean square or the variance.
      norm_after: whether the outputs of attention and feed-forward are normalised, too, before they are added.
      parallel: whether attention and feed-forward read the same hidden states, each through its norm; by default the
        feed-forward reads what attention has added to.
      activation: of the feed-forward; ``"gelu"`` by the error function, ``"gelu_tanh"`` by its approximation.
      gated: ``down(activation(gate(x)) * up(x))``; if False ``down(activation(up(x)))``.
      qkv_bias, out_bias, feed_forward_bias: which projections have a bias.
      qk_norm: whether every query and key is normalised, by RMSNorm over head_dim, before positions enter.
      rope: rotary positions; None for none.
      local_rope: those of the layers that have a window; None if they are the same.
      alibi: whether ALiBi's bias is added to the logits. Beside ``rope``, both are used in every head.
      learned: whether a learned vector of its position, below ``context``, is added to that of each token.
      embedding_scale: the vectors of tokens are multiplied by this, ``embedding_norm``: and normalised.
      attention_scale: of ``q . k``; None for ``1 / sqrt(head_dim)``.
      attention_softcap, softcap: logits of attention, and of the next token, stay within plus and minus this; None for
        no cap.
      tied: whether the embedding is the output matrix, too.
    """

    dim: int
    hidden: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_after: bool = False
    parallel: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool = False
    rope: Rope | None = Rope()
    local_rope: Rope | None = None
    alibi: bool = False
    learned: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    softcap: float | None = None
    tied: bool = False

    def window(self, layer: int) -> int | None:
        """How many positions the queries of a layer see, themselves included; None for all."""
        return self.windows[layer] if self.windows else None

    def encoding(self, window: int | None) -> Encoding | None:
        """How positions enter the attention of a layer with this window."""
        rope = self.local_rope if window is not None and self.local_rope is not None else self.rope
        alibi = ALiBi.of(self.kv_heads, self.heads // self.kv_heads) if self.alibi else None
        if rope is None:
            return alibi
        rotary = rope.encoding(self.head_dim)
        return rotary if alibi is None else Hybrid(rotary, alibi)

    @property
    def form(self) -> dict[str, float]:
        """How attention differs from a softmax of ``q . k / sqrt(head_dim)``: see `corm_jax.step`."""
        form = {"scale": self.attention_scale, "softcap": self.attention_softcap}
        return {name: value for name, value in form.items() if value is not None}


def _precision(dtype: Any) -> str | None:
    """That of a product: a GPU rounds float32 factors to TF32 unless told not to. 16 bits stay what they are."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def _linear(inputs: int, outputs: int, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    how = {"dtype": dtype, "param_dtype": dtype, "precision": _precision(dtype)}
    return nnx.Linear(inputs, outputs, use_bias=bias, rngs=rngs, **how)


class _Norm:
    """Statistics and parameters are float32, whatever is normalised, also where JAX promotes nothing by itself."""

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)  # pyright: ignore


class RMSNorm(_Norm, nnx.RMSNorm):
    """``scale x / sqrt(mean(x^2) + eps)``."""


class LayerNorm(_Norm, nnx.LayerNorm):
    """``scale (x - mean(x)) / sqrt(var(x) + eps) + bias``."""


def _norm(kind: str, size: int, config: Config, dtype: Any, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    made = {"rms": RMSNorm, "layer": LayerNorm}[kind]
    return made(size, epsilon=config.norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention through an evicting cache."""

    def __init__(self, config: Config, window: int | None, dtype: Any, rngs: nnx.Rngs):
        linear = partial(_linear, dtype=dtype, rngs=rngs)
        self.config, self.span = config, window
        self.q = linear(config.dim, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = linear(config.dim, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = linear(config.dim, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = linear(config.heads * config.head_dim, config.dim, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (_norm("rms", config.head_dim, config, dtype, rngs) for _ in range(2))

    def __call__(self, x: Float[Array, "batch tokens dim"], attend: Attend) -> Float[Array, "batch tokens dim"]:
        config = self.config
        q, k, v = (one(x).reshape(*x.shape[:2], -1, config.head_dim) for one in (self.q, self.k, self.v))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        form = config.form if self.span is None else {**config.form, "window": self.span}
        output = attend(q, k, v, config.encoding(self.span), **form)
        return self.out(output.reshape(*output.shape[:2], -1))


class FeedForward(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or without the gate ``down(activation(up(x)))``."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        linear = partial(_linear, bias=config.feed_forward_bias, dtype=dtype, rngs=rngs)
        self.gate = linear(config.dim, config.hidden) if config.gated else None
        self.up = linear(config.dim, config.hidden)
        self.down = linear(config.hidden, config.dim)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activation(self.up(x)))
        return self.down(activation(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each behind its norm and beside a residual."""

    def __init__(self, config: Config, index: int, dtype: Any, rngs: nnx.Rngs):
        norm = partial(_norm, config.norm, config.dim, config, dtype, rngs)
        self.parallel = config.parallel
        self.attention_norm, self.attention = norm(), Attention(config, config.window(index), dtype, rngs)
        self.feed_forward_norm, self.feed_forward = norm(), FeedForward(config, dtype, rngs)
        self.after_attention, self.after_feed_forward = (norm() if config.norm_after else None for _ in range(2))

    def __call__(
        self, x: Float[Array, "batch tokens dim"], position: Int[Array, "batch tokens"], attend: Attend
    ) -> Float[Array, "batch tokens dim"]:
        attended = self.attention(self.attention_norm(x), attend)
        y = x + (attended if self.after_attention is None else self.after_attention(attended))
        found = self.feed_forward(self.feed_forward_norm(x if self.parallel else y))
        return y + (found if self.after_feed_forward is None else self.after_feed_forward(found))


class Transformer(nnx.Module):
    """The decoder: a `corm_jax.Decoder`.

    >>> config = Config(vocab=100, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8)
    >>> model = Transformer(config, rngs=nnx.Rngs(0))
    >>> x = model.embed(jnp.arange(12)[None], jnp.arange(12)[None])
    >>> x.shape, model.logits(x).shape
    ((1, 12, 32), (1, 12, 100))
    """

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        norm = partial(_norm, config.norm, config.dim, config, dtype, rngs)
        embed = partial(nnx.Embed, features=config.dim, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config = config
        self.embedding = embed(config.vocab)
        self.learned = embed(config.context) if config.learned else None
        self.embedding_norm = norm() if config.embedding_norm else None
        self.layers = nnx.List([Layer(config, index, dtype, rngs) for index in range(config.layers)])
        self.norm = norm()
        self.head = None if config.tied else _linear(config.dim, config.vocab, dtype=dtype, rngs=rngs)

    def __repr__(self) -> str:
        sizes = {name: getattr(self.config, name) for name in ("vocab", "layers", "heads", "kv_heads", "head_dim")}
        return line("Transformer", **sizes, dtype=self.embedding.param_dtype)

    __str__ = __repr__

    @broadcasts
    def embed(
        self, tokens: Int[Array, "batch tokens"], position: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens dim"]:
        """The vectors of the tokens. Where positions are learned, one beyond the last of them gives NaN."""
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.learned is not None:
            x = x + self.learned.embedding[...].at[position].get(mode="fill", fill_value=jnp.nan)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    @broadcasts
    def logits(self, x: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Float32 scores of the next token."""
        x = self.norm(x)
        if self.head is not None:
            scores = self.head(x).astype(jnp.float32)
        else:
            embedding = self.embedding.embedding[...]
            x = x.astype(embedding.dtype)
            scores = jnp.dot(x, embedding.T, precision=_precision(embedding.dtype)).astype(jnp.float32)
        cap = self.config.softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)
