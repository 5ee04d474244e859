"""H2O: heavy hitters and a recent window (arXiv 2306.14048).

Every key accumulates the attention that it gets (section 4, algorithm 1), and the key with the least is evicted:

    S[i]  =  sum over queries t of alpha_t[i]        (the mean over a group under grouped-query attention)

The newest ``recent`` are exempt; the paper's runs split a budget B in halves, ``recent`` = B / 2. An evicted key's
score is forgotten. A raw sum favours early keys, which more queries have seen: ``attention=mean`` divides it by the
key's age. The released code leaves one key neither candidate nor recent, and lets evicted keys come back on ties; this
follows the paper. The sum is float32, exact to the 2^24th part of itself: where a key has drawn the whole attention of
millions of queries, one query more no longer changes the sum.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from corm_jax.core.arrays import largest
from corm_jax.core.observation import Observation
from corm_jax.core.options import choice, number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec


@policy
class H2O(Policy):
    """On a budget, keep what has drawn most attention so far, and the newest.

    Without a budget (`corm_jax.budget`) nothing is evicted before the slots run out.

    Args:
      recent: newest keys that are never evicted. A number, or one for each head.
      attention: ``"sum"`` of what a key has drawn, or its ``"mean"``: the sum over the key's age in queries.
    """

    recent: PerHead = number(256, "newest keys that are never evicted; the paper: half of the budget", least=0)
    attention: str = choice("sum", "mean", help="attention summed | divided by the key's age")

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.recent, recent=self.recent, needs=("attention",))

    def init(self, spec: CacheSpec) -> Float[Array, "*slots"]:
        return jnp.zeros(spec.slots, jnp.float32)

    def observe(self, state: Float[Array, "*slots"], observation: Observation, slots: Slots) -> Float[Array, "*slots"]:
        return state + observation.mean.sum(0)

    def score(self, state: Float[Array, "*slots"], slots: Slots) -> Float[Array, "*slots"]:
        age = (slots.seen - slots.position).astype(jnp.float32)
        score = state if self.attention == "sum" else state / age
        return jnp.where(slots.newest(self.recent), largest(score), score)
