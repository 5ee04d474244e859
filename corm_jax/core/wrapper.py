"""A policy around another, the base of `Budget`, `Protect` and `Oneshot`."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int, Num

from corm_jax.core.observation import Observation
from corm_jax.core.options import concrete, policy
from corm_jax.core.policy import Policy, Traits, check_policy
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec, State
from corm_jax.showing.brief import between, line


@policy
class Wrapper(Policy):
    """Does all that the policy inside does. Those that inherit change what they are for.

    That holds for what it says of itself, too: `traits` are those of the policy inside, all of them, and a class that
    inherits changes them there, in one place.
    """

    policy: Any

    def __post_init__(self):
        check_policy(self.policy)

    @property
    def traits(self) -> Traits:
        return self.policy.traits

    def init(self, spec: CacheSpec) -> State:
        return self.policy.init(spec)

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        return self.policy.observe(state, observation, slots)

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return self.policy.retain(state, slots)

    def score(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        return self.policy.score(state, slots)

    def merged(self, k: Any, v: Any, state: State, slots: Slots, keep: Bool[Array, "*slots"]) -> tuple[Any, Any, State]:
        return self.policy.merged(k, v, state, slots, keep)

    def for_layer(self, layer: int, layers: int) -> Policy:
        return dataclasses.replace(self, policy=self.policy.for_layer(layer, layers))

    def moment(self, state: State, slots: Slots) -> Int[Array, "..."]:
        return self.policy.moment(state, slots)

    def important(self, observation: Observation, slots: Slots) -> Bool[Array, "tokens *slots"]:
        return self.policy.important(observation, slots)

    def noted(self, state: State, important: Bool[Array, "tokens *slots"], seen: Int[Array, "tokens *ones"]) -> State:
        return self.policy.noted(state, important, seen)


def innermost(policy: Any) -> Any:
    """The policy inside all wrappers."""
    while isinstance(policy, Wrapper):
        policy = policy.policy
    return policy


def name_of(policy: Any) -> str:
    """What a policy is called in messages, as in ``Oneshot(Corm)``."""
    name = type(policy).__name__
    return f"{name}({name_of(policy.policy)})" if isinstance(policy, Wrapper) else name


def in_short(policy: Any) -> str:
    """A policy in a few words: what differs from the defaults, and of an array its shape and range.

    >>> from corm_jax.policies import budget, Corm
    >>> in_short(budget(Corm(window=np.array([[16, 64]])), 512))
    'Budget(Corm(window=16..64 [1, 2]), tokens=512)'
    """
    if isinstance(policy, list | tuple):
        each = list(dict.fromkeys(map(in_short, policy)))
        return each[0] if len(each) == 1 else f"{len(each)} policies, {each[0]} first"
    if not dataclasses.is_dataclass(policy):
        return type(policy).__name__
    inside, named = [], {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if field.name == "policy":
            inside = [in_short(value)]
        elif not concrete(value):
            if isinstance(value, str):
                named |= {field.name: repr(value)} if value != field.default else {}
            else:
                named[field.name] = type(value).__name__
        elif np.ndim(value):
            named[field.name] = f"{between(value)} {list(np.shape(value))}"
        elif isinstance(field.default, type(dataclasses.MISSING)) or value != field.default:
            named[field.name] = value
    return line(type(policy).__name__, *inside, **named)
