"""Protection: any policy, made to keep the first tokens, the newest, or both."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Num

from corm_jax.policies.options import number, policy, whole
from corm_jax.policies.wrapper import Wrapper
from corm_jax.types import PerHead, Policy, Slots, State, add, largest


@policy
class Protect(Wrapper):
    """A policy that neither drops nor gives up the first ``sinks`` and the newest ``recent`` keys: see `protect`."""

    sinks: PerHead = number(0, "first tokens that never go")
    recent: PerHead = number(0, "newest tokens that never go")

    def __post_init__(self):
        whole(0, sinks=self.sinks, recent=self.recent)

    @property
    def protected(self) -> PerHead:
        return add(self.policy.protected, add(self.sinks, self.recent))

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live & (self.policy.retain(state, slots) | self._safe(slots))

    def rank(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        rank = self.policy.rank(state, slots)
        return jnp.where(self._safe(slots), largest(rank), rank)

    def _safe(self, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.newest(self.recent) | (slots.position < slots.spread(self.sinks))


def protect(policy: Policy, *, sinks: PerHead = 0, recent: PerHead = 0) -> Protect:
    """A policy with attention sinks and a recent window that it never evicts.

    Args:
      sinks, recent: how many tokens, from 0 up. Numbers, or one for each head. Texts shorter than that stay whole.

    Raises:
      CormError: for other numbers.

    >>> from corm_jax.policies import TOVA
    >>> protect(TOVA(), sinks=4, recent=32).protected
    36
    """
    return Protect(policy=policy, sinks=sinks, recent=recent)
