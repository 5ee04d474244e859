"""Key-value caches of fixed capacity: make, insert, evict, usage. The only code that writes slots.

Attention does not care in which order keys are stored. So nothing is ever shifted or gathered: a key that goes
only loses its position, and a key that comes takes any free slot of its head. Shapes stay static, and one
compiled step serves a sequence of any length.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from corm_jax.errors import CormError
from corm_jax.policies.options import concrete, whole
from corm_jax.types import EMPTY, ENDLESS, Caches, CacheSpec, LayerCache, Policy, Slots, Usage


def make_cache(policy: Policy, spec: CacheSpec, batch: int | None = None) -> LayerCache:
    """An empty cache for one layer: of one sequence, or of a batch, each leaf then with a leading ``batch`` axis.

    >>> from corm_jax.policies import Full
    >>> make_cache(Full(), CacheSpec(kv_heads=2, capacity=8, head_dim=4), batch=3).k.shape
    (3, 2, 8, 4)
    """
    if spec.capacity < 1 or (batch is not None and batch < 1):
        raise CormError(f"capacity and batch must be at least 1, not {spec.capacity} and {batch}")
    cache = LayerCache(
        k=jnp.zeros((*spec.slots, spec.head_dim), spec.dtype),
        v=jnp.zeros((*spec.slots, spec.head_dim), spec.dtype),
        position=jnp.full(spec.slots, EMPTY, jnp.int32),
        state=policy.init(spec),
        seen=jnp.zeros((), jnp.int32),
        prompt=jnp.full((), ENDLESS, jnp.int32),
        overflow=jnp.zeros(spec.kv_heads, jnp.int32),
    )
    return cache if batch is None else jax.tree.map(lambda x: jnp.tile(x, (batch, *(1,) * x.ndim)), cache)


def slots(cache: LayerCache) -> Slots:
    """The view of a cache that a policy gets."""
    return Slots(cache.position, cache.seen, cache.prompt)


def insert(
    policy: Policy,
    cache: LayerCache,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""],
) -> LayerCache:
    """Stores the first ``count`` of the given keys and values, and moves the clock on by as many.

    They take free slots first. When those run out the policy's lowest `rank` goes, among equals the oldest key;
    each such loss is counted in ``overflow``.
    """
    tokens, (kv_heads, capacity) = k.shape[0], cache.position.shape
    if tokens > capacity:
        raise CormError(f"{tokens} new keys do not fit into {capacity} slots: use a smaller chunk or more capacity")
    seen = cache.seen + count
    priority = policy.rank(cache.state, slots(cache)._replace(seen=seen))
    slot = lowest(jnp.where(cache.position >= 0, priority, _least(priority)), cache.position, tokens)
    arrives = jnp.arange(tokens) < count
    head = jnp.arange(kv_heads)[:, None]
    lost = (cache.position[head, slot] >= 0) & arrives[None]
    target = jnp.where(arrives[None], slot, capacity)  # out of bounds, so dropped

    def write(buffer, value):
        return buffer.at[..., head, target].set(value.astype(buffer.dtype), mode="drop")

    fresh = policy.init(CacheSpec(kv_heads, capacity, k.shape[-1], cache.k.dtype))
    return LayerCache(
        k=cache.k.at[head, target].set(k.swapaxes(0, 1).astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[head, target].set(v.swapaxes(0, 1).astype(cache.v.dtype), mode="drop"),
        position=write(cache.position, jnp.broadcast_to(cache.seen + jnp.arange(tokens), slot.shape)),
        state=jax.tree.map(lambda leaf, new: write(leaf, new[..., head, slot]), cache.state, fresh),
        seen=seen,
        prompt=cache.prompt,
        overflow=cache.overflow + lost.sum(-1, dtype=jnp.int32),
    )


def expect(caches: Caches, tokens: Int[np.ndarray, " batch"]) -> Caches:
    """Says how many tokens the prompt has that is read next, row by row."""
    return tuple(cache._replace(prompt=cache.seen + tokens) for cache in caches)


def evict(policy: Policy, cache: LayerCache, allowed: Bool[Array, ""]) -> LayerCache:
    """Frees the slots that the policy does not retain; none where ``allowed`` is false."""
    keep = policy.retain(cache.state, slots(cache)) | ~jnp.asarray(allowed)
    return cache._replace(position=jnp.where(keep, cache.position, EMPTY))


def lowest(
    rank: Num[Array, "kv_heads capacity"], position: Int[Array, "kv_heads capacity"], count: int
) -> Int[Array, "kv_heads {count}"]:
    """The slots of each head with the ``count`` lowest (rank, position), lowest first."""
    if count == 1:  # two reductions, far cheaper than a sort
        tied = rank == rank.min(-1, keepdims=True)
        return jnp.where(tied, position, jnp.iinfo(jnp.int32).max).argmin(-1, keepdims=True).astype(jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, position.shape, 1)
    return jax.lax.sort((rank, position, index), num_keys=2, dimension=1)[2][:, :count]


def usage(caches: Caches) -> Usage:
    """How full the caches are, in slots and in bytes."""
    live = jnp.stack([(cache.position >= 0).sum(-1, dtype=jnp.int32) for cache in caches])
    bytes_per_key = [2 * cache.k.shape[-1] * cache.k.dtype.itemsize for cache in caches]
    kv_heads = [cache.k.shape[1] for cache in caches]
    seen = caches[0].seen
    return Usage(
        live=live,
        seen=seen,
        overflow=jnp.stack([cache.overflow for cache in caches]),
        bytes_live=sum(int(n.sum()) * size for n, size in zip(live, bytes_per_key, strict=True)),
        bytes_full=sum(int(seen.sum()) * heads * size for heads, size in zip(kv_heads, bytes_per_key, strict=True)),
        bytes_allocated=sum(leaf.nbytes for leaf in jax.tree.leaves(caches)),
    )


def per_layer(policy: Policy | Sequence[Policy], layers: int) -> tuple[Policy, ...]:
    """One policy a layer: those given, or the one given, as it is `for_layer` where it, or one inside it, differs."""
    if not isinstance(policy, Policy):
        if len(policy) != layers:
            raise CormError(f"{len(policy)} policies for {layers} layers: give one for all, or one for each")
        return tuple(policy)

    def varies(part: Any) -> bool:
        return hasattr(part, "for_layer")

    def of_layer(layer: int) -> Policy:
        return jax.tree.map(lambda x: x.for_layer(layer, layers) if varies(x) else x, policy, is_leaf=varies)

    return tuple(of_layer(layer) for layer in range(layers))


def whole_prompt(policy: Policy | Sequence[Policy]) -> bool:
    """Whether it keeps, in some layer, every key until the prompt has been read."""
    policies = [policy] if isinstance(policy, Policy) else policy
    return any(getattr(one, "whole_prompt", False) for one in policies)


def slots_for(policy: Policy | Sequence[Policy], capacity: int | None, tokens: int, chunk: int) -> int:
    """The capacity to allocate: the one asked for, if it can work, or as much as can be needed.

    That is one slot for every token, or, for policies that say how many keys stay at ``most``, so many and a chunk.
    """
    policies = [policy] if isinstance(policy, Policy) else policy
    if capacity is None:
        most: list[Any] = [getattr(one, "most", None) for one in policies]
        if not all(concrete(one) for one in most):
            return max(tokens, chunk)
        return max(min(tokens, max(int(np.max(one)) for one in most) + chunk), chunk)
    check_slots(capacity, chunk, "a chunk")
    for one in policies:
        if concrete(one.protected):
            check_slots(
                capacity, int(np.max(one.protected)), "the keys that the policy never gives up, such as its recent ones"
            )
    return capacity


def prompt_of(policy: Policy | Sequence[Policy], prompt: int | None, tokens: int) -> int:
    """How many of a text's tokens are the prompt: as said, or `ENDLESS` where nobody asks.

    Raises:
      CormError: for a prompt that is longer than the text, or none for a policy that waits for its end.
    """
    if prompt is None:
        if whole_prompt(policy):
            raise CormError("the policy waits for the end of the prompt: say how many of the tokens are the prompt")
        return ENDLESS
    whole(1, prompt=prompt)
    if prompt > tokens:
        raise CormError(f"a prompt of {prompt} tokens does not end within a text of {tokens}: say fewer")
    return prompt


def check_prompt(policy: Policy | Sequence[Policy], capacity: int, tokens: int) -> None:
    """Raises unless there are slots for a prompt, if the policy keeps all of it."""
    if whole_prompt(policy):
        check_slots(capacity, tokens, "the whole prompt, which the policy keeps until it has been read")


def check_slots(capacity: int, need: int, what: str) -> None:
    """Raises unless there are slots for ``need`` keys."""
    if capacity < need:
        raise CormError(f"capacity {capacity} cannot hold {what} ({need} keys): raise the capacity")


def _least(x: Array) -> Array:
    limit = jnp.iinfo(x.dtype).min if jnp.issubdtype(x.dtype, jnp.integer) else -jnp.inf
    return jnp.asarray(limit, x.dtype)
