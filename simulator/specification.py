"""Which rule in NumPy and plain Python specifies which policy of `corm_jax`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from corm_jax import policies
from corm_jax.errors import CormError
from corm_jax.types import Policy
from simulator import rules
from simulator.reference import Reading, corm_messages

Reference = Callable[..., Reading]
"""A specification: ``(q [tokens, group, head_dim], k, v [tokens, head_dim], *, chunks, capacity, **fields)``.

The fields are those of the policy's dataclass; as in `simulator.reference.corm_messages`.
"""

WHOLE: dict[type, Reference] = {policies.Corm: corm_messages}
"""Specifications that read a head by themselves: CORM's keeps the paper's matrix of messages."""

RULES: dict[type, type[rules.Rule]] = {
    policies.Full: rules.Rule,
    policies.Corm: rules.Corm,
    policies.StreamingLLM: rules.StreamingLLM,
    policies.H2O: rules.H2O,
    policies.Scissorhands: rules.Scissorhands,
    policies.TOVA: rules.TOVA,
    policies.L2Norm: rules.L2Norm,
    policies.Random: rules.Random,
}


def specified(policy: Policy) -> bool:
    """Whether the policy has a specification here."""
    inner = policy
    while isinstance(inner, policies.Budget | policies.Protect):
        inner = inner.policy
    return type(inner) in RULES


def readings(
    policy: Policy,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    chunks: Sequence[int] | None = None,
    capacity: int | None = None,
    reference: Reference | None = None,
) -> list[Reading]:
    """What the specification says of a layer, head by head.

    Args:
      q: ``[tokens, kv_heads, group, head_dim]``; k, v: ``[tokens, kv_heads, head_dim]``.
      chunks, capacity: as in `simulator.reference.corm_messages`.
      reference: a specification of one head to ask instead.

    Raises:
      CormError: for a policy that nobody specified.
    """
    how, heads = {"chunks": chunks, "capacity": capacity}, range(q.shape[1])
    if reference := reference or WHOLE.get(type(policy)):
        return [reference(q[:, h], k[:, h], v[:, h], **how, **fields_of(policy, h)) for h in heads]
    return rules.read([rule_of(policy, head) for head in heads], q, k, v, **how)


def rule_of(policy: Policy, head: int) -> rules.Rule:
    """A fresh rule for one head."""
    fields = fields_of(policy, head)
    if isinstance(policy, policies.Budget):
        least = np.broadcast_to(policy.protected, head + 1)[head]
        return rules.Budget(rule_of(fields.pop("policy"), head), least=int(least), **fields)
    if isinstance(policy, policies.Protect):
        return rules.Protect(rule_of(fields.pop("policy"), head), **fields)
    if type(policy) not in RULES:
        raise CormError(f"{type(policy).__name__} has no specification in simulator.rules")
    return RULES[type(policy)](**fields)


def fields_of(policy: Any, head: int) -> dict[str, Any]:
    """A policy's hyperparameters by name, those of one head where there is one for each."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {name: value[head] if isinstance(value, np.ndarray) else value for name, value in values.items()}
