"""The one-shot prompt: any policy, made to read the whole prompt before it evicts anything."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from corm_jax.core.options import policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import Slots
from corm_jax.core.types import State
from corm_jax.core.wrapper import Wrapper


@policy
class Oneshot(Wrapper):
    """A policy that keeps everything until the prompt has been read: see `oneshot`."""

    @property
    def traits(self) -> Traits:
        return super().traits._replace(whole_prompt=True, most=None)

    def moment(self, state: State, slots: Slots) -> Int[Array, "*slots"]:
        return jnp.maximum(self.policy.moment(state, slots), slots.prompt)

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        inner = replace(slots, arrived=None) if slots.reading else slots  # all that came since the prompt began
        return slots.live & ((slots.seen < slots.prompt) | self.policy.retain(state, inner))


def oneshot(policy: Policy) -> Oneshot:
    """A policy that attends over the whole prompt first, evicts once at its end, and from then on as usual.

    The cache has to hold the prompt, and has to be told where it ends: `corm_jax.prefill` does that, and in a model of
    your own `corm_jax.begin_prompt`.

    >>> from corm_jax.policies import Corm
    >>> oneshot(Corm(window=64, recent=32)).traits.whole_prompt
    True
    """
    return Oneshot(policy=policy)
