"""Which function of `simulator.reference` specifies which policy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from corm_jax.policies import Corm, Full
from simulator.reference import Reading, corm_messages, full

Reference = Callable[..., Reading]
"""A specification: ``(q [tokens, group, head_dim], k, v [tokens, head_dim], *, chunks, capacity, **fields)``.

The fields are those of the policy's dataclass; as in `simulator.reference.corm_messages`.
"""

SPECIFICATIONS: dict[type, Reference] = {Corm: corm_messages, Full: full}


def fields_of(policy: Any, head: int) -> dict[str, Any]:
    """A policy's hyperparameters by name, those of one head where there is one for each."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {name: value[head] if np.ndim(value) else value for name, value in values.items()}
