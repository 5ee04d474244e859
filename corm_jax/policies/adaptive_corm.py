"""Adaptive CORM: a head that comes back to keys which CORM would have let go keeps everything.

CORM (`corm_jax.policies.corm`) loses for good what nobody asked for during w queries. Few heads ever ask for such
dormant keys, and those that do carry recall. They show it while reading: with m well above 1 a key is important only at
a sharp look, ``alpha_t[i] >= m/t``, and

    return_t[i]  =  important_t[i]  and CORM would have evicted i at clock t - 1:
                    last[i] <= t - 1 - w  and  position[i] < t - 1 - r  and  t - 1 >= w

Every head keeps everything during a trial of so many tokens. Each return, those of the trial too, pays for p queries
more; several dormant keys that one query finds are as many returns:

    evict as CORM does, unless   t  <=  trial + p * (returns to the keys that are live, by all queries so far)

A head that cannot pay loses its dormant keys, and with them their returns, so that it hardly ever stops to evict again.
Not from a paper: it is the online counterpart of RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819),
which find such heads beforehand. A budget, or a full cache, takes the least recently important key, as in CORM.
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
    """Of each slot's key: when it was last important, and how often it was returned to."""

    last: Int[Array, "*slots"]
    count: Int[Array, "*slots"]


@policy
class AdaptiveCorm(Policy):
    """Keep everything in heads that come back to dormant keys, and in the others do as CORM.

    Args:
      window: w, in queries. A number, or one for each head.
      recent: r, in tokens. Likewise.
      multiple: m; a key is important at alpha >= m/t, in the mean over the query heads of its group. Likewise.
      patience: p, in queries. Likewise. The larger, the more heads keep everything.
      trial: in tokens, from 0 up. Likewise. Heads need some w to show what they are: below about 3 w recall suffers.

    >>> import jax
    >>> jax.tree.leaves(AdaptiveCorm())
    [256, 128, 16, 5, 768]
    """

    window: PerHead = number(256, "w: queries whose verdict counts", least=1)
    recent: PerHead = number(128, "r: newest keys that never go", least=1)
    multiple: PerHead = number(16, "m: how many times 1/t of the attention makes a key important", least=1)
    patience: PerHead = number(5, "p: queries that a head may take for each return to a dormant key", least=1)
    trial: PerHead = number(768, "tokens before a head has to come back to any", least=0)

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.recent, recent=self.recent, needs=("attention",))

    @property
    def corm(self) -> Corm:
        """What a head does that does not come back."""
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
