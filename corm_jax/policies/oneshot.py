"""The one-shot prompt: any policy, made to read the whole prompt before it evicts anything."""

from jaxtyping import Array, Bool

from corm_jax.policies.options import policy
from corm_jax.policies.wrapper import Wrapper
from corm_jax.types import Policy, Slots, State, Traits


@policy
class Oneshot(Wrapper):
    """A policy that keeps everything until the prompt has been read: see `oneshot`."""

    @property
    def traits(self) -> Traits:
        return super().traits._replace(whole_prompt=True, most=None)

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live & ((slots.seen < slots.prompt) | self.policy.retain(state, slots))


def oneshot(policy: Policy) -> Oneshot:
    """A policy that attends over the whole prompt first, evicts once at its end, and then goes on as always.

    The cache has to hold the prompt, and has to be told where it ends: `corm_jax.prefill` does that, and in a model of
    your own `corm_jax.begin_prompt`.

    >>> from corm_jax.policies import Corm
    >>> oneshot(Corm(window=64, recent=32)).whole_prompt
    True
    """
    return Oneshot(policy=policy)
