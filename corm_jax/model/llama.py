"""A LLaMA-style decoder in Flax NNX that holds parameters only: caches in, caches out.

RMSNorm, rotary positions, grouped-query attention over slots, SwiGLU. The module is a pytree, so it goes through
`jax.jit` and `jax.vmap` as an argument like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from corm_jax.core import cache, positions, step
from corm_jax.core.arguments import check_caches, check_count
from corm_jax.core.arrays import broadcasts, iota
from corm_jax.core.capacity import per_layer, per_layer_capacity
from corm_jax.core.options import integer
from corm_jax.core.policy import Policy
from corm_jax.core.types import Caches, CacheSpec, Capacity, LayerCache
from corm_jax.errors import CormError
from corm_jax.showing.brief import line


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a decoder. Field by field what a checkpoint's own ``config.json`` says."""

    vocab: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope: positions.Rope = positions.Rope()
    tied: bool = False
    context: int = 8192
    """Positions that the model was trained on; beyond them quality is not to be expected."""


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
        self.kv_heads, self.head_dim, self.rope = config.kv_heads, config.head_dim, config.rope

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        cache: LayerCache,
        policy: Policy,
        count: Int[Array, " batch"],
        chunk: int,
    ) -> tuple[
        Float[Array, "batch tokens dim"],
        LayerCache,
        Int[Array, "batch chunks kv_heads"],
        Float[Array, " batch"],
    ]:
        batch, tokens, _ = x.shape
        read = jax.vmap(partial(step.read, chunk=chunk), in_axes=(None, 0, 0, 0, 0, 0, None))
        output, cache, live, passes = read(policy, cache, *self.project(x), count, self.encoding)
        blocks = passes.shape[1]
        some = iota(blocks) * -(-tokens // blocks) < count[:, None]  # blocks with tokens
        total, blocks = (x.sum(1, dtype=jnp.float32) for x in (jnp.where(some, passes, 0), some))
        mean = total / jnp.maximum(blocks, 1.0)
        return self.out(output.reshape(batch, tokens, -1)), cache, live, mean

    @property
    def encoding(self) -> positions.Rotary:
        """How positions enter."""
        return positions.Rotary(self.rope.frequencies(self.head_dim))

    def project(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[
        Float[Array, "batch tokens kv_heads group head_dim"],
        Float[Array, "batch tokens kv_heads head_dim"],
        Float[Array, "batch tokens kv_heads head_dim"],
    ]:
        """Queries, keys and values of tokens, without positions."""
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, self.kv_heads, -1, self.head_dim)
        k = self.k(x).reshape(batch, tokens, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, tokens, self.kv_heads, self.head_dim)
        return q, k, v


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

    def __call__(self, x, cache, policy, count, chunk):
        output, cache, live, passes = self.attention(self.attention_norm(x), cache, policy, count, chunk)
        x = x + output
        return x + self.feed_forward(self.feed_forward_norm(x)), cache, live, passes


@partial(jax.jit, static_argnames="chunk")
def _through(layer, x, cache, policy, count, *, chunk):
    """One trace for all equal layers. To trace each by itself takes longer than to load their compiled program."""
    return layer(x, cache, policy, count, chunk)


class Course(NamedTuple):
    """What became of a block of tokens on its way through the caches.

    Attributes:
      live: int32 ``[layer, batch, chunks, kv_heads]``, live keys after each chunk.
      passes: float32 ``[layer, batch]``, how often a block of the exact recurrence attended until its evictions were
        settled (`corm_jax.core.exact`), on average over those with tokens; in chunks 1.
    """

    live: Int[Array, "layer batch chunks kv_heads"]
    passes: Float[Array, "layer batch"]


class Llama(nnx.Module):
    """The decoder.

    >>> from corm_jax.policies import Corm
    >>> config = Config(vocab=100, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8)
    >>> model, policy = Llama(config, rngs=nnx.Rngs(0)), Corm(window=4, recent=2)
    >>> caches = model.make_caches(policy, batch=1, capacity=16)
    >>> x, caches, course = model(policy, caches, jnp.arange(12)[None], jnp.array([12]), chunk=1)
    >>> model.logits(x).shape, course.live.shape      # live keys [layer, batch, chunks, kv_heads]
    ((1, 12, 100), (2, 1, 12, 2))
    """

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.dim, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = _Norm(config, dtype, rngs)
        self.head = None if config.tied else _linear(config.dim, config.vocab, dtype=dtype, rngs=rngs)

    def __repr__(self) -> str:
        sizes = {name: getattr(self.config, name) for name in ("vocab", "layers", "heads", "kv_heads", "head_dim")}
        return line("Llama", **sizes, dtype=self.dtype)

    __str__ = __repr__

    @property
    def dtype(self) -> np.dtype:
        """The dtype of parameters, activations and caches."""
        return jnp.dtype(self.embed.param_dtype)

    def make_caches(
        self,
        policy: Policy | Sequence[Policy],
        *,
        batch: SupportsIndex,
        capacity: Capacity,
        stores: SupportsIndex | None = None,
        tokens: SupportsIndex | None = None,
    ) -> Caches:
        """Empty caches, one a layer.

        Args:
          policy: one for all layers, or a sequence with one for each.
          batch: rows.
          capacity: slots a key-value head; for all layers, or a sequence with one for each.
          stores: sets of slots a layer; 1 is a pool, which its heads share. None: one for each head.
          tokens: how many will be read at most, if that is known: see `corm_jax.make_cache`.
        """
        sizes = per_layer_capacity(capacity, self.config.layers)
        shared = None if stores is None else integer("stores", stores)
        specs = [CacheSpec(self.config.kv_heads, size, self.config.head_dim, self.dtype, shared) for size in sizes]
        policies = per_layer(policy, self.config.layers)
        pairs = zip(policies, specs, strict=True)
        return Caches.of(cache.make_cache(one, spec, batch, tokens=tokens) for one, spec in pairs)

    @broadcasts
    def __call__(
        self,
        policy: Policy | Sequence[Policy],
        caches: Caches,
        tokens: Int[Array, "batch tokens"],
        count: Int[Array, " batch"],
        *,
        chunk: int,
    ) -> tuple[Float[Array, "batch tokens dim"], Caches, Course]:
        """Reads a block of tokens through the caches.

        Args:
          policy: one for all layers, or a sequence with one for each.
          caches: what `make_caches` or an earlier call returned.
          tokens: int32 ``[batch, tokens]``; positions go on from each row's clock.
          count: how many tokens of each row are real, from 0 to all; the rest is padding, and changes nothing. Traced
            counts that are not in that range count as its nearest end.
          chunk: tokens between evictions; it divides the number of tokens. 1 is the exact recurrence.

        Returns:
          Hidden states for `logits`, the caches, and what became of the block.

        Raises:
          CormError: for caches of another model, policy or batch.
        """
        policies, config = per_layer(policy, self.config.layers), self.config
        if np.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            what = f"{jnp.result_type(tokens)} of the shape {np.shape(tokens)}"
            raise CormError(f"tokens must be whole numbers [batch, tokens], got {what}")
        check_caches(policies, caches, config.kv_heads, config.head_dim, batch=len(tokens))
        count = check_count(count, *tokens.shape)
        x = self.embed(tokens)
        updated, live, passes = [], [], []
        for layer, cache_in, one in zip(self.layers, caches, policies, strict=True):
            x, cache_out, live_in_layer, passes_in_layer = _through(layer, x, cache_in, one, count, chunk=chunk)
            updated.append(cache_out)
            live.append(live_in_layer)
            passes.append(passes_in_layer)
        return self.norm(x), Caches.of(updated), Course(jnp.stack(live), jnp.stack(passes))

    @broadcasts
    def logits(self, x: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Float32 scores of the next token."""
        if self.head is not None:
            return self.head(x).astype(jnp.float32)
        embedding = self.embed.embedding[...]
        x = x.astype(embedding.dtype)
        return jnp.dot(x, embedding.T, precision=_precision(embedding.dtype)).astype(jnp.float32)
