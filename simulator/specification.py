"""Which rule in NumPy and plain Python specifies which policy of `corm_jax`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from corm_jax import policies
from corm_jax.core.policy import Policy
from corm_jax.core.prompt import whole_prompt
from corm_jax.errors import CormError
from simulator import rules
from simulator.reading import Form, read_layer
from simulator.reference import Reading, corm_messages

Reference = Callable[..., Reading]
"""A specification: ``(q [tokens, group, head_dim], k, v [tokens, head_dim], *, chunks, capacity, **fields)``.

The fields are those of the policy's dataclass; as in `simulator.reference.corm_messages`. If the policy waits for the
end of the prompt (`whole_prompt`), there is also ``prompt``, the number of its tokens; and ``attend``, see
`simulator.reference.Attend`, for attention of another form than ``softmax(q . k / sqrt(head_dim))``.
"""

REFERENCES: dict[type, Reference] = {policies.Corm: corm_messages}
"""Specifications that read a head by themselves: CORM's keeps the paper's matrix of messages."""

RULES: dict[type, type[rules.Rule]] = {
    policies.Full: rules.Rule,
    policies.Corm: rules.Corm,
    policies.AdaptiveCorm: rules.AdaptiveCorm,
    policies.StreamingLLM: rules.StreamingLLM,
    policies.Window: rules.Window,
    policies.H2O: rules.H2O,
    policies.Scissorhands: rules.Scissorhands,
    policies.TOVA: rules.TOVA,
    policies.L2Norm: rules.L2Norm,
    policies.Random: rules.Random,
    policies.SnapKV: rules.SnapKV,
    policies.PyramidKV: rules.PyramidKV,
    policies.AdaKV: rules.AdaKV,
}

MISSING = "register its rule in NumPy with simulator.specification.specifies, see docs/your-policy.md"
"""The way out for a policy without a specification."""

RuleClass = TypeVar("RuleClass", bound=type[rules.Rule])


def specifies(policy: type[Policy]) -> Callable[[RuleClass], RuleClass]:
    """Registers a rule as the specification of a policy of your own; a decorator of the rule's class.

    ``check_policy``, ``check_kept`` and ``python -m simulator check`` find it from then on. The rule is made with the
    policy's fields as keyword arguments, a fresh one for each head of each layer: `simulator.rules.Rule`. Where the two
    are in separate modules, name the policy by that of the rule: ``my_rules:Odd``.

    >>> import corm_jax as cj
    >>> @cj.policy
    ... class Oldest(cj.Policy):
    ...     first: int = 2
    ...
    ...     def score(self, state, slots):
    ...         return -slots.position
    >>> @specifies(Oldest)
    ... class OldestRule(rules.Rule):
    ...     def __init__(self, *, first):
    ...         self.first = first
    ...
    ...     def order(self, i, t):
    ...         return -i
    >>> specified(cj.budget(Oldest(), 4))
    True

    Raises:
      CormError: for what is not a policy's class, or has a specification already.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise CormError(f"specifies takes the class of a policy, as in specifies(Odd), not {policy!r}")
    if policy in RULES or policy in REFERENCES:
        raise CormError(f"{policy.__name__} has a specification already: {(RULES | REFERENCES)[policy].__name__}")

    def register(rule: RuleClass) -> RuleClass:
        RULES[policy] = rule
        return rule

    return register


COMBINATORS = policies.Budget | policies.Protect | policies.Oneshot


def specified(policy: Policy) -> bool:
    """Whether the policy has a specification here."""
    inner = policy
    while isinstance(inner, COMBINATORS):
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
    stores: int | None = None,
    prompt: float = math.inf,
    layer: int = 0,
    layers: int = 1,
    reference: Reference | None = None,
    form: Form | None = None,
) -> list[Reading]:
    """What the specification says of a layer, head by head.

    Args:
      q: ``[tokens, kv_heads, group, head_dim]``; k, v: ``[tokens, kv_heads, head_dim]``.
      chunks, capacity: as in `simulator.reference.corm_messages`.
      stores: the heads share so many sets of slots, ``capacity`` for each head: a matter of rules, which know the layer
        as a whole.
      prompt: how many of the tokens are the prompt, if anybody said.
      layer, layers: which layer it is, of how many.
      reference: a specification of one head to ask instead.
      form: that of the attention; None for ``softmax(q . k / sqrt(head_dim))`` over all earlier keys.

    Raises:
      CormError: for a policy that nobody specified.
    """
    how, heads = {"chunks": chunks, "capacity": capacity}, range(q.shape[1])
    shared = stores is not None and capacity is not None
    if not shared and (reference := reference or REFERENCES.get(type(policy))):
        how |= {"prompt": prompt} if whole_prompt(policy) else {}
        attend: list[dict[str, Any]] = [{"attend": partial(form.attend, h)} if form else {} for h in heads]
        return [reference(q[:, h], k[:, h], v[:, h], **how, **attend[h], **fields_of(policy, h, layer)) for h in heads]
    how |= {"form": form} if form else {}
    return read_layer(
        [rule_of(policy, head, layer, layers) for head in heads], q, k, v, stores=stores, prompt=prompt, **how
    )


def rule_of(policy: Any, head: int, layer: int = 0, layers: int = 1) -> rules.Rule:
    """A fresh rule for one head of one layer."""
    fields = fields_of(policy, head, layer)
    if isinstance(policy, COMBINATORS):
        inner = rule_of(fields.pop("policy"), head, layer, layers)
        if isinstance(policy, policies.Budget):
            return rules.Budget(inner, least=int(_own(policy.traits.protected, head, layer)), **fields)
        return (rules.Protect if isinstance(policy, policies.Protect) else rules.Oneshot)(inner, **fields)
    if type(policy) not in RULES:
        raise CormError(f"{type(policy).__name__} has no specification: {MISSING}")
    where: dict[str, Any] = {"layer": layer, "layers": layers} if isinstance(policy, policies.PyramidKV) else {}
    if issubclass(RULES[type(policy)], rules.AdaKV):
        sizes = (getattr(policy, name) for name in ("budget", "window"))
        heads = max(np.size(x) if np.ndim(x) < 2 else np.shape(x)[1] for x in sizes)
        every = (fields_of(policy, h, layer) for h in range(heads))
        where |= {"shares": [(one["budget"], one["window"]) for one in every]} if heads > 1 else {}
    return RULES[type(policy)](**fields, **where)


def fields_of(policy: Any, head: int, layer: int = 0) -> dict[str, Any]:
    """A policy's hyperparameters by name, those of one head where there is one for each, of one layer likewise."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {name: _own(value, head, layer) for name, value in values.items()}


def _own(value: Any, head: int, layer: int) -> Any:
    """A head's own of ``[kv_heads]`` or ``[layers, kv_heads]``, of NumPy or JAX; other values are everybody's."""
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        return value
    own = np.asarray(value)
    return (own[layer, head] if own.ndim == 2 else own[head] if own.ndim else own).item()
