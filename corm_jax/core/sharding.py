"""Caches on several devices: which axis of each array is split over which axis of a mesh.

If the batch is split, each device has some of the rows. If heads are split, each device has some of the stores and
their heads; under `jax.shard_map` it computes a layer with fewer heads.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from corm_jax.core.options import map_numbers, shown
from corm_jax.core.policy import Policy
from corm_jax.core.types import Caches, LayerCache, OfHead
from corm_jax.errors import CormError

Axis: TypeAlias = str | tuple[str, ...] | None
"""An axis of a mesh by its name, or several; None for no axis."""


def partition_specs(tree: Any, mesh: Mesh | AbstractMesh, *, heads: Axis = None, batch: Axis = None) -> Any:
    """The `jax.sharding.PartitionSpec` of each array, in a pytree of the same structure.

    Args:
      tree: a `LayerCache`, the `Caches` of a model, or a policy, whose numbers may differ by head. The first axis of a
        cache with a batch is the batch; other axes before the stores, such as one for layers, are not split.
      mesh: the devices.
      heads: the axis of the mesh over which the heads of each layer are split.
      batch: the axis of the mesh over which the rows of a batch are split.

    Raises:
      CormError: for a mesh without such an axis, or with one that does not divide the stores or the rows.

    >>> from corm_jax import CacheSpec, Full, make_cache
    >>> cache = make_cache(Full(), CacheSpec(kv_heads=2, capacity=8, head_dim=4), batch=3)
    >>> specs = partition_specs(cache, AbstractMesh((3, 2), ("rows", "heads")), heads="heads", batch="rows")
    >>> specs.k, specs.clock.seen
    (P('rows', 'heads'), P('rows',))
    """
    if isinstance(tree, Caches):
        layers = [partition_specs(one, mesh, heads=heads, batch=batch) for one in tree]
        return Caches.of(layers)
    if isinstance(tree, LayerCache):
        return _of_cache(tree, mesh, heads, batch)
    if isinstance(tree, Policy):
        return _of_policy(tree, mesh, heads)
    raise CormError(f"partition_specs takes a LayerCache, the Caches of a model, or a policy, not {shown(tree)}")


def _of_cache(cache: LayerCache, mesh: Any, heads: Axis, batch: Axis) -> LayerCache:
    *leading, kv_heads = cache.overflow.shape
    stores = cache.position.shape[-2]
    if batch is not None:
        if not leading:
            raise CormError(f"a cache of one sequence has no rows for the mesh axis {batch!r}: make one with batch=...")
        _check_divides(mesh, batch, leading[0], "rows", "add rows without tokens")
    if heads is not None:
        size, way = _size(mesh, heads), "take fewer devices for the heads, or split the batch"
        if kv_heads % size == 0:
            way = f"make the cache with stores={size}, or a multiple"
        what = "key-value heads" if stores == kv_heads else f"stores, shared by {kv_heads} key-value heads"
        _check_divides(mesh, heads, stores, what, way)

    def at(axis: int) -> Callable[[Any], PartitionSpec]:
        return lambda x: _spec(x.ndim, batch, heads, x.ndim - axis)

    def of_state(part: Any) -> Any:
        return jax.tree.map(at(1 if isinstance(part, OfHead) else 2), part)

    specs = jax.tree.map(at(2), cache._replace(state=None, clock=None))  # `[..., stores, slots]`
    return specs._replace(
        k=at(3)(cache.k),
        v=at(3)(cache.v),
        state=jax.tree.map(of_state, cache.state, is_leaf=lambda part: isinstance(part, OfHead)),
        overflow=at(1)(cache.overflow),
        clock=jax.tree.map(lambda x: _spec(x.ndim, batch), cache.clock),
    )


def _of_policy(policy: Policy, mesh: Any, heads: Axis) -> Policy:
    def one(x: Any) -> PartitionSpec:
        if not jax.numpy.ndim(x) or heads is None:
            return PartitionSpec()
        _check_divides(mesh, heads, x.shape[-1], "key-value heads", "take fewer devices for the heads")
        return _spec(x.ndim, None, heads, x.ndim - 1)

    return map_numbers(one, policy)


def _spec(ndim: int, batch: Axis, heads: Axis = None, at: int = 0) -> PartitionSpec:
    """Of an array with the batch first, if there is one, and heads or their stores at an axis."""
    axes: list[Axis] = [None] * ndim
    if heads is not None:
        axes[at] = heads
    if batch is not None and ndim:
        axes[0] = batch
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _size(mesh: Any, axis: Axis) -> int:
    """How many devices there are along an axis of a mesh."""
    names = axis if isinstance(axis, tuple) else (axis,)
    for name in names:
        if name not in mesh.shape:
            raise CormError(f"the mesh has the axes {tuple(mesh.shape)}, and none of them is {name!r}")
    return math.prod(mesh.shape[name] for name in names)


def _check_divides(mesh: Any, axis: Axis, count: int, what: str, way: str) -> None:
    size = _size(mesh, axis)
    if count % size:
        raise CormError(f"the mesh axis {axis!r} of {size} devices does not divide {count} {what}: {way}")
