"""Key-value caches of fixed capacity: make, insert, usage. The only code that writes slots.

Attention does not care in which order keys are stored. So nothing is ever shifted: a key that is evicted only loses its
position, and a key that comes takes any free slot of its store. Shapes stay static, and one compiled step serves a
sequence of any length.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arrays import EMPTY, ENDLESS, anywhere, iota, largest, ordered
from corm_jax.core.exact import planned
from corm_jax.core.layout import of_stores
from corm_jax.core.options import concrete, integer, map_numbers, numbers_in, numbers_of, shown
from corm_jax.core.policy import Policy, check_policy
from corm_jax.core.slots import Slots
from corm_jax.core.types import Caches, CacheSpec, Capacity, Clock, LayerCache, Made, State, Usage, by_slot
from corm_jax.core.wrapper import Wrapper, name_of
from corm_jax.errors import CormError

RUN = 32
"""Slots that are searched together for free ones. Does not change results."""

PROTECTED = "the keys that the policy never gives up, such as its recent ones"


def make_cache(
    policy: Policy, spec: CacheSpec, batch: SupportsIndex | None = None, *, tokens: SupportsIndex | None = None
) -> LayerCache:
    """An empty cache for one layer: of one sequence, or of a batch, each leaf then with a leading ``batch`` axis.

    A policy that waits for the end of the prompt has to be told where that is, with `begin_prompt`.

    Args:
      policy: whose state the cache will hold.
      spec: its shape.
      batch: how many rows there are; None for one sequence.
      tokens: how many will be read at most, if that is known. Slots for all of them are enough for any policy.

    Raises:
      CormError: for a shape or dtype that cannot be, hyperparameters for another number of heads, or fewer slots than
        the policy never gives up and there are tokens.

    >>> from corm_jax.policies import Full
    >>> make_cache(Full(), CacheSpec(kv_heads=2, capacity=8, head_dim=4), batch=3).k.shape
    (3, 2, 8, 4)
    >>> make_cache(Full(), CacheSpec(kv_heads=2, capacity=8, head_dim=4, stores=1)).k.shape
    (1, 16, 4)
    """
    check_policy(policy)
    spec = _checked(spec)
    check_heads(policy, spec)
    short = protected_slots(policy, spec) > spec.capacity
    made = Made(remembers(policy), enough=short and tokens is not None and spec.capacity >= integer("tokens", tokens))
    check_protected(policy, spec, made)
    cache = LayerCache(
        k=jnp.zeros((*spec.slots, spec.head_dim), spec.dtype),
        v=jnp.zeros((*spec.slots, spec.head_dim), spec.dtype),
        position=jnp.full(spec.slots, EMPTY, jnp.int32),
        state=policy.init(spec),
        overflow=jnp.zeros(spec.kv_heads, jnp.int32),
        layout=of_stores(*spec.slots, spec.kv_heads),
        twin=None if policy.traits.independent else jnp.zeros((spec.kv_heads, *spec.slots), jnp.int32),
        made=made,
        clock=Clock(jnp.zeros((), jnp.int32), jnp.full((), ENDLESS, jnp.int32)),
    )
    if batch is None:
        return cache
    rows = integer("batch", batch)
    return jax.tree.map(lambda x: jnp.tile(x, (rows, *(1,) * x.ndim)), cache)


def _checked(spec: CacheSpec) -> CacheSpec:
    if not isinstance(spec, CacheSpec):
        raise CormError(f"the shape of a cache must be a CacheSpec, not {shown(spec)}")
    sizes = {name: integer(name, getattr(spec, name)) for name in ("kv_heads", "capacity", "head_dim")}
    try:
        floating = spec.dtype is not None and jnp.issubdtype(jnp.dtype(spec.dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise CormError(f"a cache holds floating-point numbers such as float32 or bfloat16, not {shown(spec.dtype)}")
    stores = spec.kv_heads if spec.stores is None else integer("stores", spec.stores)
    if sizes["kv_heads"] % stores:
        raise CormError(
            f"{sizes['kv_heads']} key-value heads cannot share {stores} stores evenly: give a divisor, such "
            "as 1, a pool for the layer"
        )
    return spec._replace(stores=stores, **sizes)


def check_heads(policy: Policy, spec: CacheSpec) -> None:
    """Raises unless every number of a policy is one, or one for each head of a layer."""
    for name, leaf in numbers_in(policy).items():
        if np.shape(leaf) not in ((), (spec.kv_heads,)):
            raise CormError(
                f"the policy has {name} of shape {np.shape(leaf)} for a layer of {spec.kv_heads} key-value heads: "
                "give one number, or one for each head"
            )


def check_protected(policy: Policy, spec: CacheSpec, made: Made | None) -> None:
    """Raises unless there are slots for what the policy never gives up, or for all tokens."""
    if not (made and made.enough):
        check_slots(spec.capacity, protected_slots(policy, spec), PROTECTED)


def protected_slots(policy: Policy, spec: CacheSpec) -> int:
    """How many slots a head the keys take that the policy never gives up; 0 if that is traced."""
    protected, stores = policy.traits.protected, spec.slots[0]
    if not concrete(protected):
        return 0
    each = np.broadcast_to(np.asarray(protected, np.int64), spec.kv_heads).reshape(stores, -1)
    return -(-int(each.sum(1).max()) * stores // spec.kv_heads)


def remembers(policy: Any) -> str:
    """The name of the policy whose state a cache holds: of the one inside those that only pass its state on."""
    while isinstance(policy, Wrapper) and type(policy).init is Wrapper.init:
        policy = policy.policy
    return type(policy).__name__


def slots(cache: LayerCache) -> Slots:
    """The view of a cache that a policy gets."""
    clock = clock_of(cache)
    return Slots(cache.position, clock.seen, clock.prompt, cache.layout, cache.twin, clock.stage != "read")


def clock_of(cache: LayerCache) -> Clock:
    """Where the sequence stands."""
    if cache.clock is None:
        raise CormError("the cache of the layer has no clock: take it out of its Caches by index, or give it theirs")
    return cache.clock


def spec(cache: LayerCache) -> CacheSpec:
    """The shape of a cache of one sequence."""
    stores, size = cache.position.shape
    kv_heads = cache.layout.kv_heads
    return CacheSpec(kv_heads, stores * size // kv_heads, cache.k.shape[-1], cache.k.dtype, stores)


def fresh(policy: Policy, shape: CacheSpec) -> State:
    """The state of a key that has just arrived: ``[..., 1, 1]``."""
    return by_slot(lambda part: part[..., :1, :1], policy.init(shape))


def stored(
    k: Float[Array, "tokens kv_heads head_dim"], v: Float[Array, "tokens kv_heads head_dim"], dtype: Any
) -> tuple[Float[Array, "kv_heads tokens head_dim"], Float[Array, "kv_heads tokens head_dim"]]:
    """Keys and values as a cache holds them.

    A cache holds no value that is not finite: what a query sees is all that it meets, and NaN times a weight of 0 would
    be NaN. The key of such a value becomes NaN instead, so that those who see it get NaN, and nobody else does.
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

    They take free slots. Where there is none, the key with the policy's lowest `score` is evicted, of those that share
    the store; among equals the oldest, then that of the first head. Each such loss is counted in ``overflow``.
    """
    since, clock = clock_of(cache).seen, clock_of(cache).after(real)
    view = replace(slots(cache), seen=clock.seen)
    kv_heads, (stores, size) = cache.layout.kv_heads, cache.position.shape
    # Free slots have the lowest score, and the lowest position. The slot tells apart what is equal in all the rest.
    score = jnp.where(view.live, ordered(policy.score(cache.state, view)), jnp.iinfo(jnp.int32).min)
    position, slot = cache.position, jnp.broadcast_to(iota(size), cache.position.shape)
    taken, found = jnp.zeros_like(view.live), []
    for _ in range(kv_heads // stores):
        found.append(_first_by(score, position, view.head, slot))
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
    return twinned(_written(cache, k[:, None], v[:, None], slot), since, 1)


def _first_by(*keys: Int[Array, "stores slots"]) -> tuple[Int[Array, " stores"], ...]:
    """The keys of the slot that comes first in its store: by the first key, then the next. One pass."""

    def earlier(some, others):
        before = False
        for one, other in zip(some[::-1], others[::-1], strict=True):
            before = (one < other) | ((one == other) & before)
        return tuple(jnp.where(before, one, other) for one, other in zip(some, others, strict=True))

    return jax.lax.reduce(keys, tuple(largest(key) for key in keys), earlier, (1,))


def merged(policy: Policy, cache: LayerCache, slots: Slots, keep: Bool[Array, "*slots"]) -> LayerCache:
    """The cache with those of some live slots that are not kept merged into others, if the policy does that."""
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
    """The cache, in which the keys of at most so many tokens, read ``since`` then, know their twins, if any do."""
    if cache.twin is None:
        return cache
    stores, size = cache.position.shape
    slot = size * iota(stores)[:, None] + iota(size)
    there = cache.position == (since + iota(tokens))[:, None, None]
    found = cache.layout.least(jnp.where(there, slot, stores * size)).T  # [kv_heads, tokens]
    twin = found[:, jnp.clip(cache.position - since, 0, tokens - 1)]
    return cache._replace(twin=jnp.where(cache.position >= since, twin, cache.twin))


def make_room(policy: Policy, cache: LayerCache, count: Int[Array, ""], tokens: int) -> LayerCache:
    """Evicts for want of slots, so that ``count`` keys of each head, ``tokens`` at most, can come. See `insert`."""
    view = replace(slots(cache), seen=clock_of(cache).seen + count)
    stores, size = cache.position.shape
    each = cache.layout.kv_heads // stores
    if tokens * each > size:
        raise CormError(f"{tokens} new keys do not fit into {size // each} slots: use a smaller chunk or more capacity")
    shared = replace(view, layout=cache.layout.merged(each))
    short = shared.total(view.live) + count * each - size
    further = (view.head,) if each > 1 else ()

    def lost():
        return shared.lowest(policy.score(cache.state, view), short, tokens * each, *further)

    out = jax.lax.cond(anywhere((short > 0).any()), lost, lambda: jnp.zeros_like(view.live))
    overflow = cache.overflow + view.total(out)
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
    return _written(cache._replace(position=position, state=state, clock=clock_of(cache).after(count)), k, v, slot)


def enlarged(cache: LayerCache, slots: int) -> LayerCache:
    """The cache with so many empty slots more at the end of each store."""

    def more(x, value=0, rows=False):
        axis = x.ndim - (2 if rows else 1)
        return jnp.pad(x, [(0, slots if at == axis else 0) for at in range(x.ndim)], constant_values=value)

    return cache._replace(
        k=more(cache.k, rows=True),
        v=more(cache.v, rows=True),
        position=more(cache.position, EMPTY),
        state=by_slot(more, cache.state),
        layout=cache.layout.enlarged(slots),
    )


def shrunk(cache: LayerCache, slots: int) -> LayerCache:
    """The cache without the last so many slots of each store. Their keys move to free ones, which are enough."""
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
        layout=cache.layout.enlarged(-slots).given(slot, head[:, cut:]),
    )


def _free_for(some: Bool[Array, "stores newcomers"], position: Int[Array, "stores slots"]) -> Int[Array, "..."]:
    """A free slot for each of some newcomers; beyond the last slot for the others, and where there is none left."""
    free = _first(position < 0, some.shape[1])
    nth = jnp.cumsum(some, -1, dtype=jnp.int32) - 1
    there = some & (nth < (position < 0).sum(-1, keepdims=True, dtype=jnp.int32))
    return jnp.where(there, jnp.take_along_axis(free, jnp.maximum(nth, 0), 1), position.shape[1])


def _first(free: Bool[Array, "stores slots"], count: int) -> Int[Array, "stores {count}"]:
    """Where the first ``count`` free slots are; anywhere, of those beyond the last.

    First the run of slots that holds each of them, then its place in the run: no sort, and little to add up.
    """
    runs = jnp.pad(free, ((0, 0), (0, -free.shape[1] % RUN))).reshape(len(free), -1, RUN)
    size = runs.sum(-1, dtype=jnp.int32)
    until, nth = jnp.cumsum(size, -1, dtype=jnp.int32), iota(count)
    run = jnp.minimum((until[:, None] <= nth[:, None]).sum(-1, dtype=jnp.int32), runs.shape[1] - 1)
    earlier = jnp.take_along_axis(until - size, run, 1)
    inside = jnp.cumsum(jnp.take_along_axis(runs, run[..., None], 1), -1, dtype=jnp.int32)
    return RUN * run + (inside <= (nth - earlier)[..., None]).sum(-1, dtype=jnp.int32)


def begin_prompt(cache: Any, tokens: Any) -> Any:
    """The cache, told that the next ``tokens`` tokens are a prompt. A policy that waits for its end evicts there.

    That is for a model of your own, which calls `corm_jax.step`: `corm_jax.prefill` does it for the models of this
    package. The prompt may be read in any number of steps; keys are evicted after the step in which it ends.

    Args:
      cache: a `LayerCache`, or the `Caches` of a model.
      tokens: how many, a whole number from 1 up; for a batch also ``[batch]``. May be traced.

    Raises:
      CormError: for another number, or other numbers of them than rows.

    >>> from corm_jax.policies import SnapKV
    >>> cache = make_cache(SnapKV(budget=4, window=2), CacheSpec(kv_heads=1, capacity=16, head_dim=8))
    >>> int(begin_prompt(cache, 12).clock.prompt)
    12
    """
    clock = _clock_in(cache, "begin_prompt")
    found = numbers_of(tokens)
    if found is None or not jnp.issubdtype(found.dtype, jnp.integer) or (concrete(found) and np.any(found < 1)):
        raise CormError(f"a prompt must have a whole number of tokens from 1 up, not {shown(tokens)}")
    if concrete(found) and np.any(found > ENDLESS):
        raise CormError(f"a prompt can have up to {ENDLESS} tokens, not {shown(tokens)}")
    if found.shape not in ((), clock.seen.shape):
        rows = f"{clock.seen.size} rows" if clock.seen.ndim else "one sequence"
        raise CormError(f"tokens has the shape {found.shape} for a cache of {rows}: give one number, or one a row")
    prompt = clock.seen + jnp.minimum(jnp.asarray(found, jnp.int32), ENDLESS - clock.seen)
    return _with(cache, replace(clock, prompt=prompt, stage="reading"))


def end_prompt(cache: Any) -> Any:
    """The `LayerCache` or the `Caches`, told that the prompt has been read to its end, in all rows of a batch.

    That only makes the steps that follow cheaper: they are compiled without the verdict on a prompt. `begin_prompt`
    begins another one.
    """
    clock = replace(_clock_in(cache, "end_prompt"), stage="read")
    return _with(cache, clock, roomy=False, block=None, moments=None)


def _clock_in(cache: Any, what: str) -> Clock:
    if isinstance(cache, LayerCache):
        return clock_of(cache)
    if not isinstance(cache, Caches):
        raise CormError(f"{what} takes a LayerCache, or the Caches of a model, not {type(cache).__name__}")
    return cache.clock


def _with(cache: Any, clock: Clock, **made: Any) -> Any:
    """The cache, or the caches, at this clock, and with that known of them."""
    if isinstance(cache, Caches):
        return Caches(tuple(_with(one, clock, **made)._replace(clock=None) for one in cache.layers), clock)
    return cache._replace(clock=clock, made=cache.made and replace(cache.made, **made))


def expect(policy: Policy | Sequence[Policy], caches: Caches, tokens: Int[np.ndarray, " batch"], prompt: Any) -> Caches:
    """The caches of a model that will read so many tokens, ``prompt`` of them a prompt. See `begin_prompt`.

    What is known of the numbers is looked at here, so that programs can do without what cannot happen.
    """
    end = np.asarray(caches.clock.seen).astype(np.int64) + tokens
    caches = begin_prompt(caches, prompt)

    def one(policy: Policy, cache: LayerCache) -> LayerCache:
        slots = cache.position.shape[-2] * cache.position.shape[-1]
        roomy, (block, moments) = bool(np.max(end) * cache.layout.kv_heads <= slots), planned(policy)
        return cache._replace(made=cache.made and replace(cache.made, roomy=roomy, block=block, moments=moments))

    return Caches.of(map(one, per_layer(policy, len(caches)), caches))


def live_keys(cache: LayerCache) -> Int[Array, " kv_heads"]:
    """How many keys of each head are live, in the cache of one sequence."""
    return slots(cache).total(slots(cache).live)


def usage(caches: Caches) -> Usage:
    """How full the caches are, in slots and in bytes.

    Raises:
      CormError: for anything but the caches of a model, each with a ``batch`` axis.
    """
    if not isinstance(caches, Caches) or caches.clock.seen.ndim != 1:
        raise CormError(
            "usage takes the Caches of a model, each of a batch; of one sequence and layer: "
            "jax.tree.map(lambda x: x[None], Caches.of([cache]))"
        )
    live = jnp.stack([jax.vmap(live_keys)(cache) for cache in caches])
    bytes_per_key = [2 * cache.k.shape[-1] * cache.k.dtype.itemsize for cache in caches]
    kv_heads = [cache.overflow.shape[-1] for cache in caches]
    seen = caches.clock.seen
    tokens = int(np.asarray(seen).sum(dtype=np.int64))
    return Usage(
        live=live,
        seen=seen,
        overflow=jnp.stack([cache.overflow for cache in caches]),
        bytes_live=sum(int(n.sum()) * size for n, size in zip(live, bytes_per_key, strict=True)),
        bytes_full=sum(tokens * heads * size for heads, size in zip(kv_heads, bytes_per_key, strict=True)),
        bytes_allocated=sum(leaf.nbytes for leaf in jax.tree.leaves(caches)),
    )


def per_layer(policy: Policy | Sequence[Policy], layers: int) -> tuple[Policy, ...]:
    """One policy a layer: those given, or the one given.

    Its method `for_layer` says what a layer gets. Hyperparameters
    ``[layers, kv_heads]`` are one for each layer and head.

    >>> from corm_jax.policies import Corm
    >>> [one.window.tolist() for one in per_layer(Corm(window=np.array([[16, 64], [32, 8]])), 2)]
    [[16, 64], [32, 8]]

    Raises:
      CormError: for another number of policies, or of rows of hyperparameters, than there are layers.
    """
    if isinstance(policy, list | tuple) and not isinstance(policy, Policy):
        if len(policy) != layers:
            raise CormError(f"{len(policy)} policies for {layers} layers: give one for all, or one for each")
        for one in policy:
            check_policy(one)
        return tuple(policy)
    check_policy(policy)
    one: Any = policy
    for shape in map(np.shape, numbers_in(policy).values()):
        if len(shape) == 2 and shape[0] != layers:
            raise CormError(
                f"the policy has hyperparameters for {shape[0]} layers of {shape[1]} heads, not for {layers} layers: "
                "give [layers, kv_heads]"
            )

    def of_layer(layer: int) -> Policy:
        return map_numbers(lambda x: x[layer] if np.ndim(x) == 2 else x, one.for_layer(layer, layers))

    return tuple(map(of_layer, range(layers)))


def per_layer_capacity(capacity: Capacity, layers: int) -> tuple[int, ...]:
    """One capacity a layer: those given, or the one given."""
    sizes = _sizes(capacity)
    if isinstance(sizes, int):
        return (sizes,) * layers
    if len(sizes) != layers:
        raise CormError(f"{len(sizes)} capacities for {layers} layers: give one for all, or one for each")
    return sizes


def _sizes(capacity: Capacity) -> int | tuple[int, ...]:
    """A capacity as an int, or as one int for each layer."""
    if isinstance(capacity, list | tuple) or np.ndim(capacity) == 1:  # pyright: ignore
        return tuple(integer(f"capacity[{layer}]", one) for layer, one in enumerate(capacity))  # pyright: ignore
    return integer("capacity", capacity)


def whole_prompt(policy: Policy | Sequence[Policy]) -> bool:
    """Whether it keeps, in some layer, every key until the prompt has been read."""
    return any(one.traits.whole_prompt for one in _several(policy))


def _several(policy: Policy | Sequence[Policy]) -> Sequence[Policy]:
    one = isinstance(policy, Policy) or not isinstance(policy, list | tuple)
    return [policy] if one else policy  # pyright: ignore


def slots_for(
    policy: Policy | Sequence[Policy], capacity: Capacity | None, tokens: SupportsIndex, chunk: SupportsIndex
) -> int | tuple[int, ...]:
    """The capacity to allocate: the one asked for, if it can work, or as much as can be needed.

    That is one slot for every token, or, for policies that say how many keys stay at ``most``, so many and a chunk.
    """
    tokens, chunk, policies = integer("tokens", tokens), integer("chunk", chunk), _several(policy)
    for one in policies:
        check_policy(one)
    if capacity is None:
        most: list[Any] = [one.traits.most for one in policies]
        if not all(concrete(one) for one in most):
            return max(tokens, chunk)
        return max(min(tokens, max(int(np.max(one)) for one in most) + chunk), chunk)
    sizes = _sizes(capacity)
    check_slots(sizes, chunk, "a chunk")
    if not isinstance(sizes, int):
        policies = per_layer(policy, len(sizes))
    protected = [one.traits.protected for one in policies]
    needs = [int(np.max(one)) if concrete(one) else 0 for one in protected]
    check_slots(sizes, max(needs) if isinstance(sizes, int) else needs, PROTECTED)
    return sizes


def prompt_of(policy: Policy | Sequence[Policy], prompt: SupportsIndex | None, tokens: int) -> int:
    """How many of a text's tokens are the prompt: as said, or `ENDLESS` if unknown and of no use to the policy.

    Raises:
      CormError: for a prompt that is longer than the text, or none for a policy that waits for its end.
    """
    if prompt is None:
        for one in _several(policy):
            if one.traits.whole_prompt:
                raise CormError(
                    f"{name_of(one)} waits for the end of the prompt: say how many of the tokens are the prompt, "
                    "with prompt=... or --prompt"
                )
        return ENDLESS
    prompt = integer("prompt", prompt)
    if prompt > tokens:
        raise CormError(f"a prompt of {prompt} tokens does not end within a text of {tokens}: say fewer")
    return prompt


def check_prompt(policy: Policy | Sequence[Policy], capacity: Capacity, tokens: int) -> None:
    """Raises unless there are slots for a prompt, if the policy keeps all of it."""
    if whole_prompt(policy):
        check_slots(capacity, tokens, "the whole prompt, which the policy keeps until it has been read")


def check_slots(capacity: Capacity, need: int | Sequence[int], what: str) -> None:
    """Raises unless there are slots for ``need`` keys of a head, in every layer, or for the need of each."""
    given = _sizes(capacity)
    sizes = [given] if isinstance(given, int) else list(given)
    needs = [need] * len(sizes) if isinstance(need, int) else list(need)
    layer = max(range(len(sizes)), key=lambda layer: needs[layer] - sizes[layer])
    if sizes[layer] < needs[layer]:
        where = "" if len(set(sizes)) == 1 else f" of layer {layer}"
        raise CormError(f"capacity {sizes[layer]}{where} cannot hold {what} ({needs[layer]} keys): raise the capacity")


def check_clock(caches: Caches, tokens: Int[np.ndarray, " batch"]) -> None:
    """Raises if so many tokens more would pass the end of a row's clock, `ENDLESS`: positions are int32."""
    end = int((np.asarray(caches.clock.seen).astype(np.int64) + tokens).max())
    if end > ENDLESS:
        raise CormError(f"the clock of a cache ends at {ENDLESS} tokens, not {end}: go on in an empty cache")


def capacities(caches: Caches) -> list[int]:
    """Slots a key-value head of a batch, layer by layer."""
    return [one.position[0].size // one.layout.kv_heads for one in caches]
