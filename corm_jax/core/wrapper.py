"""A policy around another, the base of `Budget`, `Protect` and `Oneshot`."""

from typing import Any

from jaxtyping import Array, Bool, Num

from corm_jax.core.options import policy
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec, Observation, State, Traits, check_policy, traits


@policy
class Wrapper:
    """Does all that the policy inside does. Those that inherit change what they are for.

    That holds for what it says of itself, too: `traits` are those of the policy inside, all of them, and a class that
    inherits changes them there, in one place. Each is an attribute as well, as of any policy.
    """

    policy: Any

    def __post_init__(self):
        check_policy(self.policy)

    @property
    def traits(self) -> Traits:
        return traits(self.policy)

    @property
    def protected(self) -> PerHead:
        return self.traits.protected

    def __getattr__(self, name: str) -> Any:  # asked only for what is found nowhere else
        if name in Traits._fields:
            return getattr(self.traits, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def init(self, spec: CacheSpec) -> State:
        return self.policy.init(spec)

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        return self.policy.observe(state, observation, slots)

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return self.policy.retain(state, slots)

    def important(self, observation: Observation, slots: Slots) -> Bool[Array, "tokens *slots"]:
        return self.policy.important(observation, slots)

    def rank(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        return self.policy.rank(state, slots)


def innermost(policy: Any) -> Any:
    """The policy inside all wrappers."""
    while isinstance(policy, Wrapper):
        policy = policy.policy
    return policy


def name_of(policy: Any) -> str:
    """What a policy is called in messages, as in ``Oneshot(Corm)``."""
    name = type(policy).__name__
    return f"{name}({name_of(policy.policy)})" if isinstance(policy, Wrapper) else name
