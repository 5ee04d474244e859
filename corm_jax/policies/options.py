"""The fields of a policy: numbers are pytree leaves, choices are static; both explain themselves."""

from dataclasses import field
from typing import Any

import numpy as np

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
