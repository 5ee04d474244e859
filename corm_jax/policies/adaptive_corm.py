"""Adaptive CORM: a head that returns to keys which CORM would have evicted keeps everything.

CORM (`corm_jax.policies.corm`) loses for good what was important to none of w queries. Call such a key dormant. Few
heads ever attend to dormant keys again, and recall depends on those that do. They can be recognised while a text is
read: with m well above 1 a key is important only where attention is concentrated on it, ``alpha_t[i] >= m/t``, and

    return_t[i]  =  important_t[i]  and CORM would have evicted i at clock t - 1:
                    last[i] <= t - 1 - w  and  position[i] < t - 1 - r  and  t - 1 >= w

Every head keeps everything during a trial of so many tokens. Each return, also one during the trial, prolongs that by
p queries; a query that returns to several dormant keys counts as several returns:

    evict as CORM does, unless   t  <=  trial + p * (returns to the keys that are live, by all queries so far)

Once a head evicts, the returns to the evicted keys no longer count, so it rarely goes back to keeping everything.
Not from a paper: it is the online counterpart of RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819),
which find such heads beforehand. On a budget, or without a free slot, the least recently important key is evicted, as
in CORM.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from corm_jax.core.observation import Observation
from corm_jax.core.options import number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec
from corm_jax.policies.corm import NEVER, Corm


class Returns(NamedTuple):
    """For each slot's key: when it was last important, and how many returns to it there were."""

    last: Int[Array, "*slots"]
    count: Int[Array, "*slots"]


@policy
class AdaptiveCorm(Policy):
    """Keep everything in heads that return to dormant keys, and evict in the others as CORM does.

    Args:
      window: w, in queries. A number, or one for each head.
      recent: r, in tokens. Likewise.
      multiple: m; a key is important at alpha >= m/t, in the mean over the query heads of its group. Likewise.
      patience: p, in queries. Likewise. The larger, the more heads keep everything.
      trial: in tokens, from 0 up. Likewise. A head needs a few w to return to anything: below about 3 w recall suffers.

    >>> import jax
    >>> jax.tree.leaves(AdaptiveCorm())
    [256, 128, 16, 5, 768]
    """

    window: PerHead = number(256, "w: queries whose verdict counts", least=1)
    recent: PerHead = number(128, "r: newest keys that are never evicted", least=1)
    multiple: PerHead = number(16, "m: how many times 1/t of the attention makes a key important", least=1)
    patience: PerHead = number(5, "p: queries by which each return to a dormant key puts off eviction", least=1)
    trial: PerHead = number(768, "tokens during which every head keeps everything", least=0)

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.recent, recent=self.recent, needs=("attention",))

    @property
    def corm(self) -> Corm:
        """The rule of heads that do not return to dormant keys."""
        return Corm(
            window=self.window,
            recent=self.recent,
            multiple=self.multiple,
            threshold="position",
            group="mean",
            eager=False,
        )

    def init(self, spec: CacheSpec) -> Returns:
        return Returns(self.corm.init(spec), jnp.zeros(spec.slots, jnp.int32))

    def observe(self, state: Returns, observation: Observation, slots: Slots) -> Returns:
        found = self.corm.important(observation, slots)
        # Before the first query of the chunk, and after each.
        last = jax.lax.cummax(jnp.concatenate([state.last[None], jnp.where(found, observation.seen, NEVER)]))
        clock, window = observation.seen - 1, slots.broadcast(self.window)
        dormant = (last[:-1] <= clock - window) & (clock >= window)
        dormant &= slots.position < clock - slots.broadcast(self.recent)
        return Returns(last[-1], state.count + (found & dormant).sum(0, dtype=jnp.int32))

    def retain(self, state: Returns, slots: Slots) -> Bool[Array, "*slots"]:
        returns = slots.sum_per_head(jnp.where(slots.live, state.count, 0))
        whole = (slots.seen - jnp.asarray(self.trial) - 1) // jnp.asarray(self.patience) < returns  # no large products
        return slots.live & (slots.broadcast(whole) | self.corm.retain(state.last, slots))

    def score(self, state: Returns, slots: Slots) -> Int[Array, "*slots"]:
        return self.corm.score(state.last, slots)
