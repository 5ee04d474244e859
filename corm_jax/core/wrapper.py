"""A policy around another, the base of `Budget`, `Protect` and `Oneshot`."""

import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Int, Num

from corm_jax.core.observation import Observation
from corm_jax.core.options import policy
from corm_jax.core.policy import Policy, Traits, check_policy
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec, State


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
