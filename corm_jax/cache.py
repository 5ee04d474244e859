"""Key-value caches of fixed capacity: make, insert, evict, usage. The only code that writes slots.

Attention does not care in which order keys are stored. So nothing is ever shifted or gathered: a key that goes
only loses its position, and a key that comes takes any free slot of its head. Shapes stay static, and one
compiled step serves a sequence of any length.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax.errors import CormError
from corm_jax.policies.options import concrete, integer, numbers_of, shown, truth
from corm_jax.policies.wrapper import Wrapper, name_of
from corm_jax.types import (
    EMPTY,
    ENDLESS,
    Caches,
    CacheSpec,
    Capacity,
    LayerCache,
    Made,
    Policy,
    Slots,
    State,
    Usage,
    broadcasts,
    check_policy,
    iota,
    traits,
)

PAGE = 128
"""Slots of a page, unless the cache is small. Does not change results."""

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
    >>> make_cache(Full(), CacheSpec(kv_heads=2, capacity=8, head_dim=4, pooled=True)).k.shape
    (16, 4)
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
        seen=jnp.zeros((), jnp.int32),
        prompt=jnp.full((), ENDLESS, jnp.int32),
        overflow=jnp.zeros(spec.kv_heads, jnp.int32),
        head=jnp.zeros(spec.slots, jnp.int32) if spec.pooled else None,
        made=made,
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
    return spec._replace(pooled=truth("pooled", spec.pooled), **sizes)


def check_heads(policy: Policy, spec: CacheSpec) -> None:
    """Raises unless every number of a policy is one, or one for each head of a layer."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(policy):
        if np.shape(leaf) not in ((), (spec.kv_heads,)):
            name = jax.tree_util.keystr(path).lstrip(".")
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
    protected = traits(policy).protected
    if not concrete(protected):
        return 0
    each = np.broadcast_to(np.asarray(protected, np.int64), spec.kv_heads)
    return -(-int(each.sum()) // spec.kv_heads) if spec.pooled else int(each.max())


def remembers(policy: Any) -> str:
    """The name of the policy whose state a cache holds: of the one inside those that only pass its state on."""
    while isinstance(policy, Wrapper) and type(policy).init is Wrapper.init:
        policy = policy.policy
    return type(policy).__name__


@broadcasts
def slots(cache: LayerCache) -> Slots:
    """The view of a cache that a policy gets."""
    owned = None if cache.head is None else cache.head == iota(cache.overflow.shape[-1])[:, None]
    return Slots(cache.position, cache.seen, cache.prompt, owned)


def spec(cache: LayerCache) -> CacheSpec:
    """The shape of a cache of one sequence."""
    kv_heads = cache.overflow.shape[-1]
    capacity = cache.position.size // kv_heads
    return CacheSpec(kv_heads, capacity, cache.k.shape[-1], cache.k.dtype, cache.head is not None)


@broadcasts
def insert(
    policy: Policy,
    cache: LayerCache,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""],
) -> LayerCache:
    """Stores the first ``count`` of the given keys and values, and moves the clock on by as many.

    They take free slots first. When those run out the policy's lowest `rank` goes, of the head or, in a pool, of the
    layer; among equals the oldest key, then that of the first head. Each such loss is counted in ``overflow``.

    A cache holds no value that is not finite: what a query sees is all that it meets, and NaN times a weight of 0 would
    be NaN. The key of such a value becomes NaN instead, so that those who see it get NaN, and nobody else does.
    """
    (tokens, kv_heads, _), shape = k.shape, spec(cache)
    if tokens > shape.capacity:
        raise CormError(
            f"{tokens} new keys do not fit into {shape.capacity} slots: use a smaller chunk or more capacity"
        )
    stores = 1 if shape.pooled else kv_heads  # sets of slots, each with its own newcomers: token by token, head by head
    each = kv_heads // stores

    def by_store(x):  # [..., *slots] -> [..., stores, slots]
        return x.reshape(*x.shape[: x.ndim - len(shape.slots)], stores, -1)

    def newcomers(x):  # [tokens, kv_heads, ...] -> [stores, newcomers, ...]
        return x.reshape(tokens, stores, each, *x.shape[2:]).swapaxes(0, 1).reshape(stores, -1, *x.shape[2:])

    view = slots(cache)._replace(seen=cache.seen + count)
    held = view._replace(position=by_store(cache.position), owned=None)
    short = held.total(held.live) + count * each - held.position.shape[1]
    equals = () if cache.head is None else (by_store(cache.head),)
    lost = held.lowest(by_store(policy.rank(cache.state, view)), short, tokens * each, *equals)
    slot = _first(~held.live | lost, tokens * each)
    arrives = iota(tokens * each) < count * each
    target = jnp.where(arrives, slot, held.position.shape[1])  # out of bounds, so dropped
    store = iota(stores)[:, None]

    def write(buffer, value):
        written = by_store(buffer).at[..., store, target].set(value.astype(buffer.dtype), mode="drop")
        return written.reshape(buffer.shape)

    def write_rows(buffer, rows):
        stored = buffer.reshape(stores, -1, buffer.shape[-1])
        return stored.at[store, target].set(newcomers(rows).astype(buffer.dtype), mode="drop").reshape(buffer.shape)

    fresh, v = policy.init(shape), v.astype(cache.v.dtype)
    sound = jnp.isfinite(v).all(-1, keepdims=True)
    k, v = jnp.where(sound, k, jnp.nan), jnp.where(sound, v, 0)
    whose = newcomers(jnp.broadcast_to(iota(kv_heads), (tokens, kv_heads)))
    when = newcomers(jnp.broadcast_to(cache.seen + iota(tokens)[:, None], (tokens, kv_heads)))
    loses = lost[store, slot] & arrives  # who is lost has a newcomer in its slot
    loser = jnp.where(loses, by_store(view.head)[store, slot], kv_heads)
    return cache._replace(
        k=write_rows(cache.k, k),
        v=write_rows(cache.v, v),
        position=write(cache.position, when),
        state=jax.tree.map(lambda leaf, new: write(leaf, by_store(new)[..., store, slot]), cache.state, fresh),
        seen=view.seen,
        prompt=cache.prompt,
        overflow=cache.overflow + (loser[..., None] == iota(kv_heads)).sum((0, 1), dtype=jnp.int32),
        head=None if cache.head is None else write(cache.head, whose),
    )


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


@broadcasts
def paged(cache: LayerCache) -> tuple[LayerCache, Int[Array, "pages size"]]:
    """A pool's live keys gathered into pages that each belong to one head, for a chunk of queries to attend to.

    Returns:
      A view with the slots ``[pages, size]`` and ``head [pages]``, and where in the pool each of its slots comes from;
      the size of the pool where it comes from nowhere.
    """
    shape, pool = spec(cache), cache.position.size
    size = min(PAGE, max(shape.capacity // 8, 1))
    pages = pool // size + shape.kv_heads  # enough, however the keys are shared out: one page a head is not full
    owned = (cache.head == iota(shape.kv_heads)[:, None]) & (cache.position >= 0)
    need = -(-owned.sum(-1, dtype=jnp.int32) // size)
    until = jnp.cumsum(need, dtype=jnp.int32)
    place = size * (until - need)[:, None] + jax.lax.associative_scan(jnp.add, owned.astype(jnp.int32), axis=1)
    target = jnp.where(cache.position >= 0, jnp.where(owned, place - 1, 0).sum(0, dtype=jnp.int32), pages * size)
    table = jnp.full(pages * size, pool, jnp.int32).at[target].set(iota(pool), mode="drop").reshape(pages, size)
    source = jnp.minimum(table, pool - 1)
    head = (iota(pages)[:, None] >= until).sum(-1, dtype=jnp.int32)
    view = cache._replace(
        k=cache.k[source],
        v=cache.v[source],
        position=jnp.where(table < pool, cache.position[source], EMPTY),
        state=jax.tree.map(lambda leaf: leaf[..., source], cache.state),
        seen=cache.seen,
        prompt=cache.prompt,
        overflow=cache.overflow,
        head=jnp.minimum(head, shape.kv_heads - 1),
    )
    return view, table


def learn(cache: LayerCache, state: State, table: Int[Array, "pages size"] | None = None) -> LayerCache:
    """The cache with another state of the policy, which is that of a `paged` view if there is a table."""
    if table is not None:
        state = jax.tree.map(lambda old, new: old.at[..., table].set(new, mode="drop"), cache.state, state)
    return cache._replace(state=state)


def begin_prompt(cache: LayerCache, tokens: Any) -> LayerCache:
    """The cache, told that the next ``tokens`` tokens are a prompt. A policy that waits for its end evicts there.

    That is for a model of your own, which calls `corm_jax.step`: `corm_jax.prefill` does it for the models of this
    package. The prompt may be read in any number of steps; keys are evicted after the step in which it ends.

    Args:
      cache: of one layer; of one sequence, or of a batch.
      tokens: how many, a whole number from 1 up; for a batch also ``[batch]``. May be traced.

    Raises:
      CormError: for another number, or other numbers of them than rows.

    >>> from corm_jax.policies import SnapKV
    >>> cache = make_cache(SnapKV(budget=4, window=2), CacheSpec(kv_heads=1, capacity=16, head_dim=8))
    >>> int(begin_prompt(cache, 12).prompt)
    12
    """
    if not isinstance(cache, LayerCache):
        raise CormError(f"begin_prompt takes the LayerCache of one layer, not {type(cache).__name__}: do it for each")
    found = numbers_of(tokens)
    if found is None or not jnp.issubdtype(found.dtype, jnp.integer) or (concrete(found) and np.any(found < 1)):
        raise CormError(f"a prompt must have a whole number of tokens from 1 up, not {shown(tokens)}")
    if concrete(found) and np.any(found > ENDLESS):
        raise CormError(f"a prompt can have up to {ENDLESS} tokens, not {shown(tokens)}")
    if found.shape not in ((), cache.seen.shape):
        rows = f"{cache.seen.size} rows" if cache.seen.ndim else "one sequence"
        raise CormError(f"tokens has the shape {found.shape} for a cache of {rows}: give one number, or one a row")
    prompt = cache.seen + jnp.minimum(jnp.asarray(found, jnp.int32), ENDLESS - cache.seen)
    return cache._replace(prompt=prompt, made=cache.made and replace(cache.made, prompt=True))


def expect(caches: Caches, tokens: Int[np.ndarray, " batch"]) -> Caches:
    """`begin_prompt` for every layer of a model."""
    return tuple(begin_prompt(cache, tokens) for cache in caches)


@broadcasts
def evict(policy: Policy, cache: LayerCache, allowed: Bool[Array, ""]) -> LayerCache:
    """Frees the slots that the policy does not retain; none where ``allowed`` is false."""
    keep = policy.retain(cache.state, slots(cache)) | ~jnp.asarray(allowed)
    return cache._replace(position=jnp.where(keep, cache.position, EMPTY))


def usage(caches: Caches) -> Usage:
    """How full the caches are, in slots and in bytes.

    Raises:
      CormError: for anything but the caches of a model, each with a ``batch`` axis.
    """
    if isinstance(caches, LayerCache) or not all(isinstance(one, LayerCache) and one.seen.ndim == 1 for one in caches):
        raise CormError(
            "usage takes a tuple of caches, one a layer, each of a batch; of one sequence: "
            "jax.tree.map(lambda x: x[None], (cache,))"
        )
    live = jnp.stack([jax.vmap(lambda one: slots(one).total(slots(one).live))(cache) for cache in caches])
    bytes_per_key = [2 * cache.k.shape[-1] * cache.k.dtype.itemsize for cache in caches]
    kv_heads = [cache.overflow.shape[-1] for cache in caches]
    seen = caches[0].seen
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

    Where it, or one inside it, has a method `for_layer`, that says what a layer gets. Hyperparameters
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

    def varies(part: Any) -> bool:
        return hasattr(part, "for_layer")

    def of_layer(layer: int) -> Policy:
        one = jax.tree.map(lambda x: x.for_layer(layer, layers) if varies(x) else x, policy, is_leaf=varies)
        return jax.tree.map(lambda x: x[layer] if np.ndim(x) == 2 else x, one)

    for shape in map(np.shape, jax.tree.leaves(policy)):
        if len(shape) == 2 and shape[0] != layers:
            raise CormError(
                f"the policy has hyperparameters for {shape[0]} layers of {shape[1]} heads, not for {layers} layers: "
                "give [layers, kv_heads]"
            )

    return tuple(of_layer(layer) for layer in range(layers))


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
    return any(traits(one).whole_prompt for one in _several(policy))


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
        most: list[Any] = [traits(one).most for one in policies]
        if not all(concrete(one) for one in most):
            return max(tokens, chunk)
        return max(min(tokens, max(int(np.max(one)) for one in most) + chunk), chunk)
    sizes = _sizes(capacity)
    check_slots(sizes, chunk, "a chunk")
    if not isinstance(sizes, int):
        policies = per_layer(policy, len(sizes))
    protected = [traits(one).protected for one in policies]
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
            if traits(one).whole_prompt:
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
    end = int((np.asarray(caches[0].seen).astype(np.int64) + tokens).max())
    if end > ENDLESS:
        raise CormError(f"the clock of a cache ends at {ENDLESS} tokens, not {end}: go on in an empty cache")


def capacities(caches: Caches) -> list[int]:
    """Slots a key-value head of a batch, layer by layer."""
    return [one.position[0].size // one.overflow.shape[-1] for one in caches]
