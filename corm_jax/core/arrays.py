"""Conventions of all arrays here: 32 bits, empty slots, leading axes that broadcast, conditions for a whole batch.

Axis names, here and everywhere: ``batch layer kv_heads group tokens stores slots head_dim vocab``. ``*slots`` stands
for ``stores slots``, see `corm_jax.core.layout`. Positions count from 0; the clock ``seen`` (the paper's t) is the
number of tokens read so far, the current one included. Numbers have 32 bits, also where JAX is told to use 64
(``JAX_ENABLE_X64``); the clock ends at `ENDLESS`.
"""

from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int, PyTree

P = ParamSpec("P")
T = TypeVar("T")

EMPTY = -1
"""The position of a slot that holds no key. Nothing else marks a slot as free."""

ENDLESS = 2**31 - 1
"""The end of the clock. As the end of a prompt it means unknown: every token that is read counts as prompt."""


def largest(x: Array) -> Array:
    """The largest finite number of this dtype."""
    limit = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    return jnp.asarray(limit(x.dtype).max, x.dtype)


def smallest(x: Array) -> Array:
    """The smallest finite number of this dtype."""
    limit = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    return jnp.asarray(limit(x.dtype).min, x.dtype)


def ordered(score: Array) -> Int[Array, "..."]:
    """Whole numbers in the order of these: NaN is as low as -infinity, which ties with the smallest number.

    +infinity ties with the largest, and -0 with 0.
    """
    if score.dtype == bool or (jnp.issubdtype(score.dtype, jnp.integer) and score.dtype.itemsize < 4):
        return score.astype(jnp.int32)
    if jnp.issubdtype(score.dtype, jnp.unsignedinteger):
        return jax.lax.bitcast_convert_type(score ^ jnp.uint32(1 << 31), jnp.int32)
    if jnp.issubdtype(score.dtype, jnp.integer):
        return score
    score = score.astype(jnp.float32)
    most = largest(score)
    score = jnp.clip(jnp.where(jnp.isnan(score), -most, score), -most, most)
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow towards zero, their bits away from it


def iota(size: int) -> Int[Array, " {size}"]:
    """0, 1, ... in 32 bits."""
    return jnp.arange(size, dtype=jnp.int32)


def narrow(tree: PyTree[Any]) -> PyTree[Any]:
    """Arrays of 64-bit numbers, converted to 32 bits, as JAX does unless ``JAX_ENABLE_X64`` is set."""

    def one(x):
        wide = {"int64": jnp.int32, "uint64": jnp.uint32, "float64": jnp.float32}
        if not isinstance(x, jax.Array | np.generic | np.ndarray) or jax.typeof(x).weak_type:
            return x  # Python numbers take the dtype of the array that they are combined with
        return x.astype(wide[x.dtype.name]) if x.dtype.name in wide else x

    return jax.tree.map(one, tree)


def first_by(*keys: Int[Array, "... slots"]) -> tuple[Int[Array, "..."], ...]:
    """The keys of the slot that comes first along the last axis: by the first key, then the next. One pass."""

    def earlier(some, others):
        before = False
        for one, other in zip(some[::-1], others[::-1], strict=True):
            before = (one < other) | ((one == other) & before)
        return tuple(jnp.where(before, one, other) for one, other in zip(some, others, strict=True))

    return jax.lax.reduce(keys, tuple(largest(key) for key in keys), earlier, (keys[0].ndim - 1,))


def over_group(operation: Callable[[Array, Array], Array], x: Array) -> Array:
    """A reduction over the leading axis, part by part: XLA on a CPU would transpose the array, which is slow."""
    return reduce(operation, x)


def broadcasts(function: Callable[P, T]) -> Callable[P, T]:
    """Allows rank promotion inside a function, whatever ``jax_numpy_rank_promotion`` is.

    Here and in policies leading axes broadcast over the slots on purpose. Outside the call the setting is unchanged.
    """

    @wraps(function)
    def allowed(*arguments: P.args, **options: P.kwargs) -> T:
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments, **options)

    return allowed


def varying(start: PyTree[Any], *others: PyTree[Any]) -> Any:
    """The start of a loop, marked as varying over the same devices as ``others``, as `jax.shard_map` demands."""

    def axes(one):
        return getattr(getattr(jax.typeof(one), "mat", None), "varying", frozenset())

    every = frozenset().union(*map(axes, jax.tree.leaves(others)))

    def one(x):
        missing = every - axes(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(one, start) if every else start


@custom_vmap
def anywhere(truth: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether a condition is true in any row of the batch, for `jax.lax.cond` and `jax.lax.while_loop`.

    Under `jax.vmap`, a condition that differs by row makes `cond` compute both branches and `while_loop` copy
    everything that it carries. This condition is the same for all rows, so the branch taken must also be correct for
    rows in which the condition is false.

    >>> jax.vmap(lambda x: jax.lax.cond(anywhere(x > 2), lambda: x + 1, lambda: x))(jnp.array([1, 3])).tolist()
    [2, 4]
    """
    return truth


@anywhere.def_vmap
def _(axis_size, in_batched, truth):
    return (anywhere(truth.any(0)) if in_batched[0] else anywhere(truth)), False
