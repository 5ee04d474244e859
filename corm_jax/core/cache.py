"""Key-value caches of fixed capacity: how they are made, and how full they are.

Attention does not depend on the order in which keys are stored. So keys are never moved: eviction only marks a slot as
free, and a new key is stored in any free slot of its store. Shapes stay static, and one compiled step serves a sequence
of any length.
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from corm_jax.core.arrays import EMPTY, ENDLESS
from corm_jax.core.capacity import PROTECTED, check_slots
from corm_jax.core.layout import of_stores
from corm_jax.core.options import concrete, integer, numbers_in, shown
from corm_jax.core.policy import Policy, check_policy
from corm_jax.core.slots import Slots
from corm_jax.core.types import Bytes, Caches, CacheSpec, Clock, LayerCache, Made, State, Usage, by_slot
from corm_jax.core.wrapper import Wrapper
from corm_jax.errors import CormError


def make_cache(
    policy: Policy, spec: CacheSpec, batch: SupportsIndex | None = None, *, tokens: SupportsIndex | None = None
) -> LayerCache:
    """An empty cache for one layer: of one sequence, or of a batch, in which every leaf has a leading ``batch`` axis.

    A policy that waits for the end of the prompt has to be told where that is, with `begin_prompt`.

    Args:
      policy: the policy whose state the cache will hold.
      spec: the shape of the cache.
      batch: the number of rows; None for one sequence.
      tokens: an upper bound of the tokens that will be read, if known. Slots for all of them are enough for any policy.

    Raises:
      CormError: for an impossible shape or dtype, hyperparameters for another number of heads, or fewer slots than the
        policy protects keys, unless ``tokens`` says that they are enough.

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
    enough = short and tokens is not None and spec.capacity >= integer("tokens", tokens)
    made = Made(remembers(policy), spec.kv_heads, enough)
    check_protected(policy, spec, made)
    cache = LayerCache(
        k=jnp.zeros((*spec.slots, spec.head_dim), spec.dtype),
        v=jnp.zeros((*spec.slots, spec.head_dim), spec.dtype),
        position=jnp.full(spec.slots, EMPTY, jnp.int32),
        state=policy.init(spec),
        overflow=jnp.zeros(spec.kv_heads, jnp.int32),
        layout=of_stores(*spec.slots, spec.kv_heads),
        twin=None if not policy.traits.twins else jnp.zeros((spec.kv_heads, *spec.slots), jnp.int32),
        place=None if policy.traits.positions != "cache" else jnp.zeros(spec.slots, jnp.int32),
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
    """Raises unless there are slots for the keys that the policy never evicts, or for all tokens."""
    if not (made and made.enough):
        check_slots(spec.capacity, protected_slots(policy, spec), PROTECTED)


def protected_slots(policy: Policy, spec: CacheSpec) -> int:
    """How many slots a head are needed for the keys that the policy never evicts; 0 if that is traced."""
    protected, stores = policy.traits.protected, spec.slots[0]
    if not concrete(protected):
        return 0
    each = np.broadcast_to(np.asarray(protected, np.int64), spec.kv_heads).reshape(stores, -1)
    return -(-int(each.sum(1).max()) * stores // spec.kv_heads)


def remembers(policy: Any) -> str:
    """The name of the policy whose state a cache holds: wrappers that do not change the state do not count."""
    while isinstance(policy, Wrapper) and type(policy).init is Wrapper.init:
        policy = policy.policy
    return type(policy).__name__


def slots(cache: LayerCache) -> Slots:
    """The slots of a cache, as its policy sees them."""
    clock = clock_of(cache)
    reading = clock.stage != "read"
    return Slots(cache.position, clock.seen, clock.prompt, cache.layout, cache.twin, cache.place, reading)


def clock_of(cache: LayerCache) -> Clock:
    """Where the sequence stands."""
    if cache.clock is None:
        raise CormError("the cache of the layer has no clock: take it out of its Caches by index, or give it theirs")
    return cache.clock


def spec(cache: LayerCache) -> CacheSpec:
    """The shape of a cache of one sequence."""
    stores, size = cache.position.shape
    kv_heads = len(cache.overflow)
    return CacheSpec(kv_heads, stores * size // kv_heads, cache.k.shape[-1], cache.k.dtype, stores)


def fresh(policy: Policy, shape: CacheSpec) -> State:
    """The state of a key that has just arrived: ``[..., 1, 1]``."""
    return by_slot(lambda part: part[..., :1, :1], policy.init(shape))


def live_keys(cache: LayerCache) -> Int[Array, " kv_heads"]:
    """How many keys of each head are live, in the cache of one sequence."""
    return slots(cache).sum_per_head(slots(cache).live)


def usage(caches: Caches) -> Usage:
    """How full the caches are, in slots and in bytes, of local layers also apart.

    Raises:
      CormError: for anything but the caches of a model, each with a ``batch`` axis.
    """
    if not isinstance(caches, Caches) or caches.clock.seen.ndim != 1:
        raise CormError(
            "usage takes the Caches of a model, each of a batch; of one sequence and layer: "
            "jax.tree.map(lambda x: x[None], Caches.of([cache]))"
        )
    live = jnp.stack([jax.vmap(live_keys)(cache) for cache in caches])
    windows = tuple(cache.made and cache.made.window for cache in caches)
    seen = np.asarray(caches.clock.seen).astype(np.int64)
    each = []
    for cache, keys, window in zip(caches.layers, live, windows, strict=True):
        size = 2 * cache.k.shape[-1] * cache.k.dtype.itemsize
        full = int((seen if window is None else np.minimum(seen, window)).sum()) * cache.overflow.shape[-1]
        each.append(Bytes(int(keys.sum()) * size, full * size, sum(leaf.nbytes for leaf in jax.tree.leaves(cache))))
    local = [size for size, window in zip(each, windows, strict=True) if window is not None]
    total = _sum(each)
    return Usage(
        live=live,
        seen=caches.clock.seen,
        overflow=jnp.stack([cache.overflow for cache in caches.layers]),
        bytes_live=total.live,
        bytes_full=total.full,
        bytes_allocated=total.allocated + sum(leaf.nbytes for leaf in jax.tree.leaves(caches.clock)),
        windows=windows,
        local=_sum(local) if local else None,
    )


def _sum(several: Sequence[Bytes]) -> Bytes:
    return Bytes(*map(sum, zip(*several, strict=True)))
