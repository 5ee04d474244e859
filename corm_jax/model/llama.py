"""A LLaMA-style decoder in Flax NNX that holds parameters only: caches in, caches out.

RMSNorm, rotary positions, grouped-query attention over slots, SwiGLU. The module is a pytree, so it goes through
`jax.jit` and `jax.vmap` as an argument like any other.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from corm_jax.core import positions
from corm_jax.core.arrays import broadcasts
from corm_jax.model.decoder import Attend, Shape
from corm_jax.showing.brief import line


@dataclass(frozen=True, kw_only=True)
class Config(Shape):
    """The shape of the decoder. Field by field what a checkpoint's own ``config.json`` says."""

    dim: int
    hidden: int
    norm_eps: float = 1e-5
    rope: positions.Rope = positions.Rope()
    tied: bool = False


def _precision(dtype: Any) -> str | None:
    """That of a product: a GPU rounds float32 factors to TF32 unless told not to. 16 bits stay what they are."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def _linear(inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    how = {"dtype": dtype, "param_dtype": dtype, "precision": _precision(dtype)}
    return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs, **how)


class _Norm(nnx.RMSNorm):
    """Flax's, whose float32 statistics meet what has 16 bits, also where JAX is told to promote nothing by itself."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config.dim, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class Attention(nnx.Module):
    """Grouped-query attention through an evicting cache."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        linear = partial(_linear, dtype=dtype, rngs=rngs)
        self.q = linear(config.dim, config.heads * config.head_dim)
        self.k = linear(config.dim, config.kv_heads * config.head_dim)
        self.v = linear(config.dim, config.kv_heads * config.head_dim)
        self.out = linear(config.heads * config.head_dim, config.dim)
        self.head_dim, self.rope = config.head_dim, config.rope

    def __call__(self, x: Float[Array, "batch tokens dim"], attend: Attend) -> Float[Array, "batch tokens dim"]:
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim) for x in (self.q(x), self.k(x), self.v(x)))
        output = attend(q, k, v, positions.Rotary(self.rope.frequencies(self.head_dim)))
        return self.out(output.reshape(*output.shape[:2], -1))


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        linear = partial(_linear, dtype=dtype, rngs=rngs)
        self.gate = linear(config.dim, config.hidden)
        self.up = linear(config.dim, config.hidden)
        self.down = linear(config.hidden, config.dim)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each behind its norm and beside a residual."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm, self.attention = _Norm(config, dtype, rngs), Attention(config, dtype, rngs)
        self.feed_forward_norm, self.feed_forward = _Norm(config, dtype, rngs), FeedForward(config, dtype, rngs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], position: Int[Array, "batch tokens"], attend: Attend
    ) -> Float[Array, "batch tokens dim"]:
        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nnx.Module):
    """The decoder: a `corm_jax.Decoder`.

    >>> config = Config(vocab=100, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> x = model.embed(jnp.arange(12)[None], jnp.arange(12)[None])
    >>> x.shape, model.logits(x).shape
    ((1, 12, 32), (1, 12, 100))
    """

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.vocab, config.dim, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = _Norm(config, dtype, rngs)
        self.head = None if config.tied else _linear(config.dim, config.vocab, dtype=dtype, rngs=rngs)

    def __repr__(self) -> str:
        sizes = {name: getattr(self.config, name) for name in ("vocab", "layers", "heads", "kv_heads", "head_dim")}
        return line("Llama", **sizes, dtype=self.embedding.param_dtype)

    __str__ = __repr__

    @broadcasts
    def embed(
        self, tokens: Int[Array, "batch tokens"], position: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens dim"]:
        """The vectors of the tokens; positions enter in attention."""
        return self.embedding(tokens)

    @broadcasts
    def logits(self, x: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Float32 scores of the next token."""
        x = self.norm(x)
        if self.head is not None:
            return self.head(x).astype(jnp.float32)
        embedding = self.embedding.embedding[...]
        x = x.astype(embedding.dtype)
        return jnp.dot(x, embedding.T, precision=_precision(embedding.dtype)).astype(jnp.float32)
