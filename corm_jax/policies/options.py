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


def whole(least: int, **values: Any) -> None:
    """Raises unless every value, or every entry of it, is a whole number from ``least`` up. Traced values pass."""
    for name, value in values.items():
        if isinstance(value, int | float | np.ndarray | np.generic):
            numbers = np.asarray(value)
            if numbers.dtype.kind not in "iu" or numbers.min() < least or numbers.max() > np.iinfo(np.int32).max:
                raise CormError(f"{name} must be a whole number from {least} to {np.iinfo(np.int32).max}, not {value}")
