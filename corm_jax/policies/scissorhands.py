"""Scissorhands: the keys that were unimportant to most of the last queries are evicted together (arXiv 2305.17118).

When more than B keys are live, count for each key the queries among the last w that gave it less than 1/t, and drop
the m = ``drop`` B keys with the highest counts; the newest ``recent`` are exempt (section 4, algorithm 2):

    unimportant[i]  =  | { t in the last w : alpha_t[i] < 1/t } |        (alpha: the mean over a group)

The paper's w = 400, r = 10, m = B / 2. Its released code is another rule: no budget, and a key stays if any of the
last 100 queries puts it above the 90th percentile of its row. The counts are exact: each slot holds the last w
verdicts as bits.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from corm_jax.core.arrays import varying
from corm_jax.core.observation import Observation
from corm_jax.core.options import first_below, held, is_share, number, policy, size, static
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec
from corm_jax.errors import CormError


@policy
class Scissorhands(Policy):
    """Above a budget, drop a share of it at once: the keys that most of the last queries found unimportant.

    Args:
      budget: B, the most keys that stay; or a share of the tokens seen, never below ``recent``. A number, or one for
        each head.
      window: w, in queries; static, since the state has a bit for each.
      recent: r, newest keys that are never evicted. Likewise.
      drop: m / B, the share of the budget that is dropped at once. Likewise.
    """

    budget: PerHead = size(512, "B: keys that stay at most, or a share of those seen")
    window: int = static(400, "w: queries whose verdict counts", least=1, most=2**20)
    recent: PerHead = number(10, "r: newest keys that are never evicted", least=0)
    drop: PerHead = number(0.5, "share of the budget that is evicted at once", above=0, most=1)

    def __post_init__(self):
        if low := first_below(self.budget, self.recent):
            raise CormError(f"a budget of {low[0]} keys is below the newest {low[1]}, which stay: raise it")

    @property
    def traits(self) -> Traits:
        most = None if is_share(self.budget) else self.budget
        return Traits(protected=self.recent, recent=self.recent, most=most, needs=("attention",))

    def init(self, spec: CacheSpec) -> UInt[Array, "words *slots"]:
        return jnp.zeros((math.ceil(self.window / 32), *spec.slots), jnp.uint32)

    def observe(
        self, state: UInt[Array, "words *slots"], observation: Observation, slots: Slots
    ) -> UInt[Array, "words *slots"]:
        n = observation.seen.astype(jnp.float32)
        ratio = (observation.weights * n / observation.total).mean(0)  # alpha t
        unimportant = (ratio < 1) & observation.visible

        def record(state, query):
            unimportant, seen = query
            at = (seen.reshape(()) - 1) % self.window
            bit = jnp.left_shift(jnp.uint32(1), (at % 32).astype(jnp.uint32))
            word = jnp.where(unimportant, state[at // 32] | bit, state[at // 32] & ~bit)
            return jnp.where(seen.reshape(()) <= slots.seen, state.at[at // 32].set(word), state), None

        return jax.lax.scan(record, varying(state, unimportant), (unimportant, observation.seen))[0]

    def retain(self, state: UInt[Array, "words *slots"], slots: Slots) -> Bool[Array, "*slots"]:
        least = jnp.maximum(jnp.asarray(self.recent, jnp.int32), 1)
        live, budget = slots.sum_per_head(slots.live), jnp.maximum(held(self.budget, slots.seen), least)
        share = (jnp.asarray(self.drop, jnp.float32) * budget.astype(jnp.float32)).astype(jnp.int32)
        some = jnp.minimum(jnp.maximum(share, live - budget), live - jnp.asarray(self.recent))
        return slots.live & ~slots.lowest(self.score(state, slots), jnp.where(live > budget, some, 0))

    def score(self, state: UInt[Array, "words *slots"], slots: Slots) -> Int[Array, "*slots"]:
        unimportant = jax.lax.population_count(state).astype(jnp.int32).sum(0, dtype=jnp.int32)
        return jnp.where(slots.newest(self.recent), jnp.iinfo(jnp.int32).max, -unimportant)
