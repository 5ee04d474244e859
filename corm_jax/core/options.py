"""What policies are made of: frozen dataclasses that are pytrees, whose fields explain and check themselves.

What counts as a number is decided here, in one place. Numbers of Python, NumPy scalars and arrays, concrete JAX arrays,
and lists or tuples of such numbers are accepted, as one number or as ``[kv_heads]`` or ``[layers, kv_heads]``; they are
checked and stored as Python numbers or as NumPy arrays of int32, float32 or bool. Traced numbers are accepted too: of
these the dtype and the shape are checked, since the values are unknown. A truth value is not a number.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar, dataclass_transform, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Int

from corm_jax.errors import CormError

INT32 = np.iinfo(np.int32)
Tree = TypeVar("Tree")
Class = TypeVar("Class", bound=type)


def number(
    default: int | float,
    help: str,
    *,
    least: int | float = -math.inf,
    above: int | float = -math.inf,
    most: int | float = math.inf,
) -> Any:
    """A numeric hyperparameter: a leaf of the policy, so that it may be traced, mapped over, or differ by head.

    Its kind is that of the default: true or false, a whole number, or any number.

    Args:
      default: used where nothing is given.
      help: one line for ``corm policies``.
      least, most: the range, with both ends. Whole numbers are int32 in any case.
      above: what it has to exceed, for a range without its lower end.
    """
    return field(default=default, metadata={"help": help, "least": least, "above": above, "most": most})


def size(default: int | float, help: str) -> Any:
    """A budget, a leaf of the policy: a whole number of keys from 1 up, or a share in (0, 1], by the thousandth.

    A whole number and a share differ by their dtype, also where they are traced. See `held`.
    """
    return field(default=default, metadata={"help": help, "size": True})


def weights(help: str) -> Any:
    """A pytree of arrays that is trained, or loaded: leaves of the policy, whose axes are not layers and heads."""
    return field(metadata={"help": help, "weights": True})


def choice(*choices: str, help: str) -> Any:
    """One of a few names, the first by default: static, so that a new value means a new compile."""
    return field(default=choices[0], metadata={"help": help, "choices": choices, "static": True})


def static(default: int, help: str, *, least: int | float = -math.inf, most: int | float = math.inf) -> Any:
    """A number that shapes depend on: static, so that a new value means a new compile."""
    return field(default=default, metadata={"help": help, "static": True, "least": least, "most": most})


def concrete(value: Any) -> bool:
    """Whether a number, or an array of them, can be looked at: neither traced nor something else."""
    return isinstance(value, bool | int | float | np.ndarray | np.generic) or (
        isinstance(value, jax.Array) and not isinstance(value, Tracer)
    )


def integer(name: str, value: Any, least: int = 1, most: int = INT32.max) -> int:
    """One whole number as a Python int, however it was spelled.

    >>> integer("chunk", np.int64(8)), integer("chunk", jnp.int32(8))
    (8, 8)

    Raises:
      CormError: for anything else, or a number out of range.
    """
    return _one(name, value, int, f"a whole number from {least} to {most}", least=least, most=most)


def at_least(least: int, **values: Any) -> None:
    """Raises unless every value is one whole number from ``least`` up. See `integer`."""
    for name, value in values.items():
        integer(name, value, least)


def real(name: str, value: Any, what: str, **limits: int | float) -> float:
    """One finite number as a Python float, ``what`` says within which limits; `CormError` for anything else."""
    return _one(name, value, float, what, **{"most": float(np.finfo(np.float32).max)} | limits)


def truth(name: str, value: Any) -> bool:
    """One truth value as a Python bool; `CormError` for anything else, 0 and 1 included."""
    return _one(name, value, bool, "true or false")


def one_of(name: str, value: Any, choices: Iterable) -> str:
    """One of a few names; `CormError` for anything else."""
    for one in choices:
        if isinstance(value, str) and value == one:
            return one
    raise CormError(f"{name} must be {' or '.join(choices)}, not {shown(value)}")


def is_share(size: Any) -> bool:
    """Whether a `size` is a share. That is static: it hangs on the dtype."""
    return bool(jnp.issubdtype(jnp.result_type(size), jnp.floating))


def held(size: Any, tokens: Int[Array, ""] | int) -> Int[Array, "..."]:
    """How many keys a `size` is: itself, or that share of ``tokens``, rounded down.

    >>> int(held(512, 1000)), int(held(0.25, 1000))
    (512, 250)
    """
    if not is_share(size):
        return jnp.asarray(size, jnp.int32)
    return thousandths(jnp.round(1000 * jnp.asarray(size, jnp.float32)).astype(jnp.int32), tokens)


def thousandths(per_mille: Any, tokens: Int[Array, ""] | int) -> Int[Array, "..."]:
    """``tokens * per_mille / 1000``, rounded down, without a product beyond int32."""
    per_mille, tokens = jnp.asarray(per_mille, jnp.int32), jnp.asarray(tokens, jnp.int32)
    return tokens // 1000 * per_mille + tokens % 1000 * per_mille // 1000


def combined(how: str, *numbers: Any) -> Any:
    """The sum (``"add"``), ``"minimum"`` or ``"maximum"`` of numbers from 0 up, head by head; some may be traced.

    A sum that is known may exceed int32; one that is traced ends there.
    """
    if not all(map(concrete, numbers)):
        ends = {"add": lambda one, other: jnp.minimum(one, INT32.max - other) + other}
        return reduce(ends.get(how) or getattr(jnp, how), numbers)
    found = reduce(getattr(np, how), [np.asarray(one, np.int64) for one in numbers])
    return found if found.ndim else int(found)


def first_below(sizes: Any, least: Any) -> tuple[int, int] | None:
    """The first of some sizes that is below the least that it may be, and that least; None if none is, or is known."""
    if not concrete(sizes) or not concrete(least) or is_share(sizes):
        return None
    sizes, least = np.broadcast_arrays(sizes, least)
    low = sizes < least
    return (int(sizes[low][0]), int(least[low][0])) if low.any() else None


def settled_size(name: str, value: Any) -> Any:
    """A `size` in the form in which policies keep it, shares rounded to the thousandth.

    Raises:
      CormError: for any other value.
    """
    found = numbers_of(value)
    if found is not None and _is(found, jnp.floating):
        if isinstance(found, Tracer):
            return _settled(name, found, float, "a share")
        rounded = np.round(1000 * found.astype(np.float64)) / 1000
        wrong = np.asarray(~((rounded > 0) & (found <= 1)))
        if wrong.any():
            raise CormError(
                f"a {name} that is a share must be in (0, 1], by the thousandth, not {_first(found, wrong)}"
            )
        return _settled(name, rounded, float, "a share")
    what = "a whole number of keys from 1 up, or a share such as 0.25"
    return _settled(f"a {name}", value, int, what, least=1, most=INT32.max)


def settled(one: dataclasses.Field, value: Any) -> Any:
    """The value of a policy's field in the form in which policies keep it.

    Fields without a number for a default, such as the policy inside another, are left alone.

    Raises:
      CormError: for a value that the field cannot have.
    """
    name, about = one.name, one.metadata
    if choices := about.get("choices"):
        return one_of(name, value, choices)
    if about.get("size"):
        return settled_size(name, value)
    if not isinstance(one.default, bool | int | float):
        return value
    kind = float if one.type in (float, "float") else type(one.default)
    least, above, most = (
        about.get(key, limit) for key, limit in (("least", -math.inf), ("above", -math.inf), ("most", math.inf))
    )
    if kind is bool:
        what = "true or false"
    elif kind is int:
        least, most = max(least, INT32.min), min(most, INT32.max)
        what = f"a whole number from {least} to {most}"
    elif above > -math.inf:
        what = f"above {above:g}" + (f" and at most {most:g}" if most < math.inf else "")
    elif least > -math.inf and most < math.inf:
        what = f"in [{least:g}, {most:g}]"
    elif least > -math.inf:
        what = f"at least {least:g}"
    else:
        what = f"at most {most:g}" if most < math.inf else "a number"
    found = _settled(name, value, kind, what, least, above, most)
    if about.get("static") and (isinstance(found, Tracer) or np.ndim(found)):
        raise CormError(f"{name} shapes what is compiled: it must be one number that is not traced, not {shown(value)}")
    return found


def shown(value: Any) -> str:
    """A value in one line, short enough for a message."""
    if isinstance(value, Tracer):
        return f"a traced {value.dtype} of shape {value.shape}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one(name, value, kind, what, **limits) -> Any:
    """`_settled` for one number that is not traced."""
    found = numbers_of(value)
    if found is None or isinstance(found, Tracer) or found.ndim:
        raise CormError(f"{name} must be {what}, not {shown(value)}")
    return _settled(name, value, kind, what, **limits)


def _settled(name, value, kind, what, least=-math.inf, above=-math.inf, most=math.inf) -> Any:
    """Numbers of a kind and within a range: Python numbers, arrays of NumPy, or tracers, of the dtypes of policies."""
    accepted = {bool: (jnp.bool_,), int: (jnp.integer,), float: (jnp.integer, jnp.floating)}[kind]
    dtype = {bool: np.bool_, int: np.int32, float: np.float32}[kind]
    found = numbers_of(value)
    if found is None or not any(_is(found, each) for each in accepted):
        raise CormError(f"{name} must be {what}, not {shown(value)}")
    if found.ndim > 2 or not found.size:
        raise CormError(
            f"{name} has the shape {found.shape}: give one number, or one for each head, as [kv_heads] or "
            "[layers, kv_heads]"
        )
    if isinstance(found, Tracer):
        return found if found.dtype == dtype else found.astype(dtype)
    if kind is not bool:
        wrong = np.asarray(~((found >= least) & (found > above) & (found <= most)))
        if wrong.any():
            raise CormError(f"{name} must be {what}, not {_first(found, wrong)}")
    return found.astype(dtype) if found.ndim else kind(found)


def numbers_of(value: Any) -> Any:
    """Numbers as an array of NumPy, or a tracer as it is; None for what is no number, and for ragged lists."""
    if isinstance(value, Tracer):
        return value if _is(value, jnp.number) or _is(value, jnp.bool_) else None
    if isinstance(value, list | tuple):
        parts = [numbers_of(one) for one in value]
        if not parts or any(one is None for one in parts):
            return None
        if len({(one.shape, _is(one, jnp.bool_)) for one in parts}) > 1:
            return None
        return (jnp if any(isinstance(one, Tracer) for one in parts) else np).stack(parts)
    if not concrete(value) or (isinstance(value, jax.Array) and _is(value, jax.dtypes.extended)):
        return None
    found = np.asarray(value)
    return found if _is(found, jnp.number) or _is(found, jnp.bool_) else None


def _is(array: Any, kind: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, kind))


def _first(found: np.ndarray, wrong: np.ndarray) -> str:
    """The first wrong one of several numbers, and where it stands."""
    if not found.ndim:
        return str(found.item())
    at = tuple(int(index[0]) for index in np.nonzero(wrong))
    return f"{found[at].item()} (at {list(at)})"


def _agree(policy: Any) -> None:
    """Raises unless all numbers of a policy, and of those inside it, are for equally many heads, and layers."""
    arrays = [(name, np.shape(leaf)) for name, leaf in numbers_in(policy).items()]
    for axis, what in ((-1, "heads"), (-2, "layers")):
        sizes = {name: shape[axis] for name, shape in arrays if len(shape) in (1, 2) and len(shape) >= -axis}
        if len(set(sizes.values())) > 1:
            (one, few), (other, many) = min(sizes.items(), key=lambda x: x[1]), max(sizes.items(), key=lambda x: x[1])
            raise CormError(f"{one} is for {few} {what} and {other} for {many}: give one number, or equally many")


def numbers_in(policy: Any) -> dict[str, Any]:
    """The numbers of a policy and of those inside it by name, as in ``policy.recent``; no `weights`."""
    paths = jax.tree_util.tree_leaves_with_path(policy)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in paths if not _weighs(policy, path)}


def map_numbers(function: Callable[[Any], Any], policy: Tree) -> Tree:
    """The policy with a function of each of its numbers in their place; its `weights` stay as they are."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x if _weighs(policy, path) else function(x), policy)


def _weighs(policy: Any, path: Any) -> bool:
    """Whether a path leads to `weights`."""
    for key in path:
        about = getattr(policy, "__dataclass_fields__", {}).get(getattr(key, "name", None))
        if about is None or about.metadata.get("weights"):
            return about is not None
        policy = getattr(policy, about.name)
    return False


# To a type checker whatever is assigned to a field is its default: `number`, `choice` and `static` are no specifiers.
@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(weights, field))
def policy(cls: Class) -> Class:
    """Makes a class a frozen, keyword-only dataclass and a pytree: numbers are leaves; choices and `static` are not.

    Every field is checked on construction, before the class's own ``__post_init__``: choices, the range of numbers, and
    that all of them are for equally many heads. What JAX makes of a policy, by `jax.tree.map` or `jax.vmap`, is not
    checked again.

    `jax.tree_util.register_dataclass` is not enough. In JAX 0.10 the structures of two classes that it registered
    compare equal if their fields do, so that `jax.jit` now and then runs the program of one policy for another.

    >>> @policy
    ... class Newest:
    ...     keys: int = number(8, "newest keys that stay", least=1)
    >>> jax.tree.leaves(Newest(keys=4))
    [4]
    >>> Newest(keys=0)
    Traceback (most recent call last):
        ...
    corm_jax.errors.CormError: keys must be a whole number from 1 to 2147483647, not 0
    """
    own = getattr(cls, "__post_init__", None)
    if not getattr(own, "checks_fields", False):  # that of a policy from which this one inherits does so already

        def check(self):
            for one in dataclasses.fields(self):
                if one.init:
                    object.__setattr__(self, one.name, settled(one, getattr(self, one.name)))
            _agree(self)
            if own:
                own(self)

        check.checks_fields = True  # pyright: ignore
        cls.__post_init__ = check
    made = dataclass(frozen=True, kw_only=True)(cls)
    no_type_check(made.__init__)  # a checker of types would refuse spellings that are accepted
    fixed = [one.name for one in dataclasses.fields(made) if one.metadata.get("static")]
    leaves = [one.name for one in dataclasses.fields(made) if one.name not in fixed]

    def flatten(value):
        return [getattr(value, name) for name in leaves], tuple(getattr(value, name) for name in fixed)

    def flatten_with_keys(value):
        values, choices = flatten(value)
        return [(GetAttrKey(name), one) for name, one in zip(leaves, values, strict=True)], choices

    def unflatten(choices, values):
        value = object.__new__(made)  # not by its constructor: what JAX puts in place of numbers is not to be validated
        for name, one in zip([*leaves, *fixed], [*values, *choices], strict=True):
            object.__setattr__(value, name, one)
        return value

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
