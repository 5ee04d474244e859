"""Storing keys and values in the slots of a cache, and freeing slots for them. The only code that writes slots."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arrays import EMPTY, anywhere, first_by, iota, largest, ordered, varying
from corm_jax.core.cache import clock_of, fresh, slots, spec
from corm_jax.core.policy import Policy
from corm_jax.core.slots import Slots
from corm_jax.core.types import LayerCache, by_slot
from corm_jax.errors import CormError

RUN = 32
"""Slots that are searched together for free ones. Does not change results."""


def stored(
    k: Float[Array, "tokens kv_heads head_dim"], v: Float[Array, "tokens kv_heads head_dim"], dtype: Any
) -> tuple[Float[Array, "kv_heads tokens head_dim"], Float[Array, "kv_heads tokens head_dim"]]:
    """Keys and values as a cache holds them.

    All values in a cache are finite. Otherwise a value that a query does not see would still affect it, since NaN times
    a weight of 0 is NaN. Where a value is not finite, its key becomes NaN instead: the queries that see the key get
    NaN, and no others.
    """
    k, v = k.astype(dtype), v.astype(dtype)
    sound = jnp.isfinite(v).all(-1, keepdims=True)
    return jnp.where(sound, k, jnp.nan).swapaxes(0, 1), jnp.where(sound, v, 0).swapaxes(0, 1)


def insert(
    policy: Policy,
    cache: LayerCache,
    k: Float[Array, "kv_heads head_dim"],
    v: Float[Array, "kv_heads head_dim"],
    real: Bool[Array, ""],
) -> LayerCache:
    """Stores one key and value of each head, if they are ``real``, and moves the clock on.

    They are stored in free slots. If a store has none, the key with the lowest `score` in it is evicted; among equals
    the oldest, then that of the first head. Each such eviction is counted in ``overflow``.
    """
    since, clock = clock_of(cache).seen, clock_of(cache).after(real)
    view = replace(slots(cache), seen=clock.seen)
    kv_heads, (stores, size) = len(cache.overflow), cache.position.shape
    # Free slots have the lowest score and the lowest position. The number of the slot breaks the remaining ties.
    score = jnp.where(view.live, ordered(policy.score(cache.state, view)), jnp.iinfo(jnp.int32).min)
    position, slot = cache.position, jnp.broadcast_to(iota(size), cache.position.shape)
    taken, found = jnp.zeros_like(view.live), []
    for _ in range(kv_heads // stores):
        found.append(first_by(score, position, view.head, slot))
        this = slot == found[-1][-1][:, None]
        taken |= this
        score, position = (jnp.where(this, largest(key), key) for key in (score, position))
    _, held, head, slot = (jnp.stack(key, -1) for key in zip(*found, strict=True))  # [stores, newcomers]
    taken &= real
    cache = merged(policy, cache, view, ~taken)
    slot, new = jnp.where(real, slot, size), fresh(policy, spec(cache))  # out of bounds, so dropped
    state = by_slot(lambda held, new: jnp.where(taken, new, held), cache.state, new)
    position = jnp.where(taken, since, cache.position)
    loser = jnp.where(real & (held >= 0), head, kv_heads)
    overflow = cache.overflow + (loser[..., None] == iota(kv_heads)).sum((0, 1), dtype=jnp.int32)
    cache = cache._replace(position=position, state=state, clock=clock, overflow=overflow)
    return _placed(twinned(_written(cache, k[:, None], v[:, None], slot), since, 1), since, 1)


def merged(policy: Policy, cache: LayerCache, slots: Slots, keep: Bool[Array, "*slots"]) -> LayerCache:
    """The cache after the live slots outside ``keep`` have been merged into others, if the policy merges keys."""
    if not policy.traits.merges:
        return cache
    k, v, state = policy.merged(cache.k, cache.v, cache.state, slots, keep)
    return cache._replace(k=k.astype(cache.k.dtype), v=v.astype(cache.v.dtype), state=state)


def _written(cache, k, v, slot):
    """The cache with the keys and values ``[kv_heads, tokens, head_dim]`` in these slots ``[stores, newcomers]``."""
    (kv_heads, tokens, head_dim), stores = k.shape, len(slot)
    store = iota(stores)[:, None]

    def write(buffer, rows):
        return buffer.at[store, slot].set(rows.reshape(stores, -1, head_dim), mode="drop")

    whose = jnp.repeat(iota(kv_heads), tokens).reshape(stores, -1)
    return cache._replace(k=write(cache.k, k), v=write(cache.v, v), layout=cache.layout.given(slot, whose))


def twinned(cache: LayerCache, since: Int[Array, ""], tokens: int) -> LayerCache:
    """The cache with `LayerCache.twin` for the keys of at most ``tokens`` tokens, read from the clock ``since`` on."""
    if cache.twin is None:
        return cache
    stores, size = cache.position.shape
    slot = size * iota(stores)[:, None] + iota(size)
    there = cache.position == (since + iota(tokens))[:, None, None]
    found = cache.layout.min_per_head(jnp.where(there, slot, stores * size)).T  # [kv_heads, tokens]
    twin = found[:, jnp.clip(cache.position - since, 0, tokens - 1)]
    return cache._replace(twin=jnp.where(cache.position >= since, twin, cache.twin))


def _placed(cache: LayerCache, since: Int[Array, ""], tokens: int) -> LayerCache:
    """The cache with `LayerCache.place` of its live keys, after ``tokens`` tokens from the clock ``since`` on.

    The earlier places are in order already, with gaps where keys were evicted. So they are counted, not sorted.
    """
    if cache.place is None:
        return cache
    size, heads = cache.position.shape[1], cache.layout.heads(*cache.position.shape)
    place = jnp.where(cache.position >= since, size + (cache.position - since), cache.place)  # newcomers are the last
    row = varying(jnp.zeros((len(cache.overflow), size + tokens), jnp.int32), cache.position)
    row = row.at[heads, jnp.where(cache.position >= 0, place, size + tokens)].set(1, mode="drop")
    before = jnp.cumsum(row, -1, dtype=jnp.int32) - row
    return cache._replace(place=before.at[heads, place].get(mode="clip"))


def make_room(policy: Policy, cache: LayerCache, count: Int[Array, ""], tokens: int) -> LayerCache:
    """Evicts keys until ``count`` keys of each head, ``tokens`` at most, can be stored. See `insert`."""
    view = replace(slots(cache), seen=clock_of(cache).seen + count)
    stores, size = cache.position.shape
    each = len(cache.overflow) // stores
    if tokens * each > size:
        raise CormError(f"{tokens} new keys do not fit into {size // each} slots: use a smaller chunk or more capacity")
    shared = replace(view, layout=cache.layout.merged(each))
    short = shared.sum_per_head(view.live) + count * each - size
    further = (view.head,) if each > 1 else ()

    def lost():
        return shared.lowest(policy.score(cache.state, view), short, tokens * each, *further)

    out = jax.lax.cond(anywhere((short > 0).any()), lost, lambda: jnp.zeros_like(view.live))
    overflow = cache.overflow + view.sum_per_head(out)
    cache = merged(policy, cache, view, ~out)
    return cache._replace(position=jnp.where(out, EMPTY, cache.position), overflow=overflow)


def insert_chunk(
    policy: Policy,
    cache: LayerCache,
    k: Float[Array, "kv_heads tokens head_dim"],
    v: Float[Array, "kv_heads tokens head_dim"],
    count: Int[Array, ""],
) -> LayerCache:
    """Stores the first ``count`` keys and values of each head in free slots, of which there are enough."""
    (kv_heads, tokens, _), (stores, _) = k.shape, cache.position.shape
    real = jnp.tile(iota(tokens) < count, (stores, kv_heads // stores))
    when = jnp.tile(clock_of(cache).seen + iota(tokens), (stores, kv_heads // stores))
    slot, store = _free_for(real, cache.position), iota(stores)[:, None]
    new = fresh(policy, spec(cache))
    state = by_slot(lambda held, new: held.at[..., store, slot].set(new, mode="drop"), cache.state, new)
    position = cache.position.at[store, slot].set(when, mode="drop")
    since, clock = clock_of(cache).seen, clock_of(cache).after(count)
    cache = _written(cache._replace(position=position, state=state, clock=clock), k, v, slot)
    return _placed(cache, since, tokens)


def enlarged(cache: LayerCache, slots: int) -> LayerCache:
    """The cache with ``slots`` more empty slots at the end of each store."""

    def more(x, value=0, rows=False):
        axis = x.ndim - (2 if rows else 1)
        return jnp.pad(x, [(0, slots if at == axis else 0) for at in range(x.ndim)], constant_values=value)

    return cache._replace(
        k=more(cache.k, rows=True),
        v=more(cache.v, rows=True),
        position=more(cache.position, EMPTY),
        state=by_slot(more, cache.state),
        place=by_slot(more, cache.place),
        layout=cache.layout.enlarged(slots),
    )


def shrunk(cache: LayerCache, slots: int) -> LayerCache:
    """The cache without the last ``slots`` slots of each store, whose keys move to free slots before them."""
    (stores, _), cut = cache.position.shape, cache.position.shape[1] - slots
    store, head = iota(stores)[:, None], cache.layout.heads(*cache.position.shape)
    slot = _free_for(cache.position[:, cut:] >= 0, cache.position[:, :cut])

    def moved(x):
        return x[..., :cut].at[..., store, slot].set(x[..., cut:], mode="drop")

    def rows(x):
        return x[:, :cut].at[store, slot].set(x[:, cut:], mode="drop")

    return cache._replace(
        k=rows(cache.k),
        v=rows(cache.v),
        position=moved(cache.position),
        state=by_slot(moved, cache.state),
        place=by_slot(moved, cache.place),
        layout=cache.layout.enlarged(-slots).given(slot, head[:, cut:]),
    )


def _free_for(some: Bool[Array, "stores newcomers"], position: Int[Array, "stores slots"]) -> Int[Array, "..."]:
    """A free slot for each new key in ``some``; an index out of bounds for the others, and if none is free."""
    free = _first(position < 0, some.shape[1])
    nth = jnp.cumsum(some, -1, dtype=jnp.int32) - 1
    there = some & (nth < (position < 0).sum(-1, keepdims=True, dtype=jnp.int32))
    return jnp.where(there, jnp.take_along_axis(free, jnp.maximum(nth, 0), 1), position.shape[1])


def _first(free: Bool[Array, "stores slots"], count: int) -> Int[Array, "stores {count}"]:
    """Indices of the first ``count`` free slots; if fewer are free, the remaining indices are arbitrary.

    First the run of slots that holds each of them is found, then its place in the run: no sort, and short sums.
    """
    runs = jnp.pad(free, ((0, 0), (0, -free.shape[1] % RUN))).reshape(len(free), -1, RUN)
    size = runs.sum(-1, dtype=jnp.int32)
    until, nth = jnp.cumsum(size, -1, dtype=jnp.int32), iota(count)
    run = jnp.minimum((until[:, None] <= nth[:, None]).sum(-1, dtype=jnp.int32), runs.shape[1] - 1)
    earlier = jnp.take_along_axis(until - size, run, 1)
    inside = jnp.cumsum(jnp.take_along_axis(runs, run[..., None], 1), -1, dtype=jnp.int32)
    return RUN * run + (inside <= (nth - earlier)[..., None]).sum(-1, dtype=jnp.int32)
