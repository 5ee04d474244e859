"""A policy around another, the base of `Budget`, `Protect` and `Oneshot`."""

from typing import Any

from jaxtyping import Array, Bool, Num

from corm_jax.policies.options import policy
from corm_jax.types import EVERYTHING, CacheSpec, Observation, PerHead, Slots, State


@policy
class Wrapper:
    """Does all that the policy inside does. Those that inherit change what they are for."""

    policy: Any

    @property
    def protected(self) -> PerHead:
        return self.policy.protected

    @property
    def needs(self) -> tuple[str, ...]:
        return getattr(self.policy, "needs", EVERYTHING)

    @property
    def positions(self) -> str:
        return getattr(self.policy, "positions", "original")

    @property
    def whole_prompt(self) -> bool:
        return getattr(self.policy, "whole_prompt", False)

    def init(self, spec: CacheSpec) -> State:
        return self.policy.init(spec)

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        return self.policy.observe(state, observation, slots)

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return self.policy.retain(state, slots)

    def rank(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        return self.policy.rank(state, slots)
