"""Protection: any policy, made to keep the first tokens, the newest, or both."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

from corm_jax.core.arrays import ENDLESS, largest
from corm_jax.core.options import INT32, combined, concrete, number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import State
from corm_jax.core.wrapper import Wrapper
from corm_jax.errors import CormError


@policy
class Protect(Wrapper):
    """A policy that never evicts the first ``sinks`` and the newest ``recent`` keys: see `protect`."""

    sinks: PerHead = number(0, "first tokens that are never evicted", least=0)
    recent: PerHead = number(0, "newest tokens that are never evicted", least=0)

    def __post_init__(self):
        super().__post_init__()
        if concrete(most := self.traits.protected) and np.max(most) > INT32.max:
            raise CormError(f"the policy would protect {np.max(most)} keys of a head: at most {INT32.max} can be")

    @property
    def traits(self) -> Traits:
        inner = super().traits
        return inner._replace(
            protected=combined("add", inner.protected, self.sinks, self.recent),
            recent=combined("maximum", inner.recent, self.recent),
            most=None if inner.most is None else combined("add", inner.most, self.sinks, self.recent),
        )

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        inner = replace(slots, arrived=None)  # keys that it would evict stay: its budget may not have held before
        return slots.live & (self.policy.retain(state, inner) | self._safe(slots))

    def moment(self, state: State, slots: Slots) -> Int[Array, "*slots"]:
        recent = slots.broadcast(self.recent)
        old = jnp.minimum(slots.position, ENDLESS - 1 - recent) + recent + 1
        when = jnp.maximum(self.policy.moment(state, slots), old)
        return jnp.where(slots.position < slots.broadcast(self.sinks), ENDLESS, when)

    def score(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        score = self.policy.score(state, slots)
        return jnp.where(self._safe(slots), largest(score), score)

    def _safe(self, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.newest(self.recent) | (slots.position < slots.broadcast(self.sinks))


def protect(policy: Policy, *, sinks: PerHead = 0, recent: PerHead = 0) -> Protect:
    """A policy with attention sinks and a recent window that it never evicts.

    Args:
      policy: the policy that decides about the other keys.
      sinks, recent: how many tokens, from 0 up. Numbers, or one for each head. Texts shorter than that stay whole.

    Raises:
      CormError: for other numbers.

    >>> from corm_jax.policies import TOVA
    >>> protect(TOVA(), sinks=4, recent=32).traits.protected
    36
    """
    return Protect(policy=policy, sinks=sinks, recent=recent)
