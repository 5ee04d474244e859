"""Attention over slots, and the loop that makes it evict.

A layer's keys depend on the layers below, never on what this layer has evicted. So a model can project a whole block of
tokens at once and leave only attention and eviction to the loop over chunks here: even the exact recurrence (chunks
of one) passes over the weights once a block, not once a token.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax import cache as cache_lib
from corm_jax.errors import CormError
from corm_jax.positions import rotate
from corm_jax.types import LayerCache, Observation, Policy, Slots


def attend(
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "kv_heads capacity head_dim"],
    v: Float[Array, "kv_heads capacity head_dim"],
    visible: Bool[Array, "tokens kv_heads capacity"],
    seen: Int[Array, " tokens"],
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], Observation]:
    """Softmax attention of each query group over its head's visible slots.

        l_i = q . k_i / sqrt(head_dim),   e_i = exp(l_i - max l),   output = sum_i e_i v_i / sum_i e_i

    Logits and weights are float32 whatever ``k`` and ``v`` hold. What invisible slots contain (NaN included) does not
    reach the output. A query that sees nothing returns zeros.

    Returns:
      The output, in the dtype of ``q``, and what the policy gets to see. ``seen`` only passes through to the latter.
    """
    kv_heads, capacity, head_dim = k.shape
    tokens, _, group, _ = q.shape
    rows = q.transpose(1, 2, 0, 3).reshape(kv_heads, group * tokens, head_dim)
    logits = jnp.einsum("hrd,hcd->hrc", rows, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    logits = logits.reshape(kv_heads, group, tokens, capacity)
    mask = visible.transpose(1, 0, 2)[:, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0.0, largest))
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)
    v = jnp.where(visible.any(0)[:, :, None], v, jnp.zeros((), v.dtype))
    output = jnp.einsum(
        "hrc,hcd->hrd",
        weights.reshape(kv_heads, group * tokens, capacity).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    ).reshape(kv_heads, group, tokens, head_dim)
    output = (output / total).transpose(2, 0, 1, 3).astype(q.dtype)
    observation = Observation(
        weights=weights.transpose(1, 2, 0, 3),
        total=total.transpose(1, 2, 0, 3),
        visible=visible,
        seen=seen[:, None, None],
        keys=k,
    )
    return output, observation


def step(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""],
    frequencies: Float[Array | np.ndarray, " pairs"] | None = None,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache]:
    """One chunk through one layer of one sequence: insert, attend, observe, evict.

    Args:
      policy, cache: the rule, and what it has kept so far.
      q, k, v: the chunk's queries, keys and values, rotated at positions ``cache.seen + (0, 1, ...)``. Each query sees
        the live keys and, causally, the chunk.
      count: how many of them are real; the rest pads a ragged batch, and changes nothing.
      frequencies: for a policy that counts ``positions`` within the cache: radians a token for each pair of a head.
        Queries and keys then come unrotated.

    Returns:
      The outputs, in the dtype of ``q``, and the cache.

    Raises:
      CormError: for more tokens than the cache has slots, or without ``frequencies`` that the policy needs.

    >>> from corm_jax import CacheSpec, Corm, make_cache
    >>> policy = Corm(window=4, recent=2)
    >>> cache = make_cache(policy, CacheSpec(kv_heads=1, capacity=4, head_dim=8))
    >>> q, k = jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 8))
    >>> output, cache = step(policy, cache, q, k, k, count=jnp.int32(3))
    >>> cache.position.tolist(), cache.state.tolist()      # all equal, so all important at t = 3
    ([[0, 1, 2, -1]], [[3, 3, 3, -2147483648]])
    """
    position = cache.seen + jnp.arange(q.shape[0])
    real = jnp.arange(q.shape[0]) < count
    cache = cache_lib.insert(policy, cache, k, v, count)
    held = cache.position[None]
    visible = (held >= 0) & (held <= position[:, None, None]) & real[:, None, None]
    slots, keys = cache_lib.slots(cache), cache.k
    if counts_in_cache(policy):
        if frequencies is None:
            raise CormError("the policy counts positions within the cache: give frequencies, and q and k unrotated")
        q, keys = _rotated_in_cache(q, keys, slots, position, frequencies)
    output, observation = attend(q, keys, cache.v, visible, position + 1)
    cache = cache._replace(state=policy.observe(cache.state, observation, slots))
    return output, cache_lib.evict(policy, cache, count > 0)


def counts_in_cache(policy: Policy) -> bool:
    """Whether keys are rotated by their place within the cache, see `Policy`."""
    return getattr(policy, "positions", "original") == "cache"


def _rotated_in_cache(q, keys, slots: Slots, position, frequencies):
    """Queries and keys at the angles of their places among the live keys of their head."""
    before = (slots.live & (slots.position < position[:, None, None])).sum(-1)  # [tokens, kv_heads]
    q = jax.vmap(rotate, in_axes=(1, 1, None), out_axes=1)(q, before, frequencies)
    return q, jax.vmap(rotate, in_axes=(0, 0, None))(keys, slots.place(), frequencies)


def read(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""],
    frequencies: Float[Array | np.ndarray, " pairs"] | None = None,
    *,
    chunk: int,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache, Int[Array, "chunks kv_heads"]]:
    """A block of tokens through one layer, ``chunk`` at a time: `step` under `jax.lax.scan`.

    Arguments as for `step`; ``chunk`` divides the number of tokens. Returns the outputs, the cache, and the number of
    live keys after each chunk.
    """
    tokens = q.shape[0]
    if chunk < 1 or tokens % chunk:
        raise CormError(f"chunk {chunk} does not divide a block of {tokens} tokens: pad the block, and say so in count")
    starts = jnp.arange(0, tokens, chunk)

    def body(cache, xs):
        q, k, v, start = xs
        output, cache = step(policy, cache, q, k, v, jnp.clip(count - start, 0, chunk), frequencies)
        slots = cache_lib.slots(cache)
        return cache, (output, slots.total(slots.live))

    chunks = jax.tree.map(lambda x: x.reshape(tokens // chunk, chunk, *x.shape[1:]), (q, k, v))
    cache, (outputs, live) = jax.lax.scan(body, cache, (*chunks, starts), unroll=tokens == chunk)
    return outputs.reshape(q.shape), cache, live
