"""What policies are made of: frozen dataclasses that are pytrees, whose fields explain themselves."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from corm_jax.errors import CormError


def number(default: int | float, help: str) -> Any:
    """A numeric hyperparameter: a leaf of the policy, so that it may be traced or mapped over."""
    return field(default=default, metadata={"help": help})


def choice(*choices: str, help: str) -> Any:
    """One of a few names, the first by default: static, so that a new value means a new compile."""
    return field(default=choices[0], metadata={"help": help, "choices": choices, "static": True})


def static(default: int, help: str) -> Any:
    """A number that shapes depend on: static, so that a new value means a new compile."""
    return field(default=default, metadata={"help": help, "static": True})


def concrete(value: Any) -> bool:
    """Whether a hyperparameter can be looked at: neither traced nor a placeholder inside a pytree operation."""
    return isinstance(value, int | float | np.ndarray | np.generic)


def whole(least: int, **values: Any) -> None:
    """Raises unless every value, or every entry of it, is a whole number from ``least`` up."""
    for name, value in values.items():
        if concrete(value):
            numbers, most = np.asarray(value), np.iinfo(np.int32).max
            if numbers.dtype.kind not in "iu" or numbers.min() < least or numbers.max() > most:
                raise CormError(f"{name} must be a whole number from {least} to {most}, not {value}")


Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(number, choice, static))
def policy(cls: Class) -> Class:
    """Makes a class a frozen, keyword-only dataclass and a pytree: numbers are leaves; choices and `static` are not.

    `jax.tree_util.register_dataclass` is not enough. In JAX 0.10 the structures of two classes that it registered
    compare equal if their fields do, so that `jax.jit` now and then runs the program of one policy for another.

    >>> @policy
    ... class Newest:
    ...     keys: int = 8
    >>> jax.tree.leaves(Newest(keys=4))
    [4]
    """
    made = dataclass(frozen=True, kw_only=True)(cls)
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
