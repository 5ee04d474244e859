"""The one-shot prompt: any policy, made to read the whole prompt before it evicts anything."""

from typing import Any

from jaxtyping import Array, Bool, Num

from corm_jax.policies.options import policy
from corm_jax.types import CacheSpec, Observation, PerHead, Policy, Slots, State


@policy
class Oneshot:
    """A policy that keeps everything until the prompt has been read: see `oneshot`."""

    policy: Any

    whole_prompt = True

    @property
    def protected(self) -> PerHead:
        return self.policy.protected

    @property
    def positions(self) -> str:
        return getattr(self.policy, "positions", "original")

    def init(self, spec: CacheSpec) -> State:
        return self.policy.init(spec)

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        return self.policy.observe(state, observation, slots)

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live & ((slots.seen < slots.prompt) | self.policy.retain(state, slots))

    def rank(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        return self.policy.rank(state, slots)


def oneshot(policy: Policy) -> Oneshot:
    """A policy that attends over the whole prompt first, evicts once at its end, and then goes on as always.

    The cache has to hold the prompt, and has to be told where it ends: `corm_jax.prefill` does that.

    >>> from corm_jax.policies import Corm
    >>> oneshot(Corm(window=64, recent=32)).whole_prompt
    True
    """
    return Oneshot(policy=policy)
