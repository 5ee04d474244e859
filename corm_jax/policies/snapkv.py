"""SnapKV: the last queries of the prompt choose which of its keys stay (arXiv 2404.14469).

When a prompt of N tokens has been read, each key before the last w is scored by the attention that the last w queries
paid to it and to its neighbours (section 4), and the B - w that score highest stay beside those last w:

    S[i]  =  sum over t in (N - w, N] of alpha_t[i]      (the mean over a group under grouped-query attention)
    keep i  if  S'[i] = max over |j - i| <= kernel / 2 of S[j]  is among the B - w highest      (j, i < N - w)

No key is evicted while the prompt is read, and no key of a token that is generated later is ever evicted. The paper's
listing leaves the pooling open and its experiments pool the maximum (LongBench: w = 32, kernel 7); ``pool=mean`` is the
default of the released code. That code scores every query head by itself; here a group has one score before scores are
pooled, which for the maximum is not the same.

The paper treats one prompt. A later prompt in the same cache, such as the next turn of a conversation, is treated like
the first: no key is evicted while it is read, and then its own last w queries, or all of them if there are fewer,
choose anew among all keys before the last w that are still live. Earlier scores are discarded.

State: one score per slot suffices: N is known in advance, so the attention of the last w queries is summed as it
arrives. Beside it stands the N for which it was summed.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arrays import anywhere, largest
from corm_jax.core.observation import Observation
from corm_jax.core.options import choice, first_below, held, number, policy, size, static
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec
from corm_jax.errors import CormError

GONE = -1.0


class Scores(NamedTuple):
    """For each slot's key: its score, `GONE` if it is evicted, and the end of the prompt that gave the score."""

    score: Float[Array, "*slots"]
    prompt: Int[Array, "*slots"]


@policy
class SnapKV(Policy):
    """When the prompt ends, keep what its last queries attend to.

    Args:
      budget: B, keys of the prompt that stay; or a share of the tokens seen when the prompt ends, never below
        ``window``. A number, or one for each head.
      window: w, the prompt's last queries, whose keys stay. Likewise.
      kernel: positions over which scores are pooled; odd, and static.
      pool: ``"max"`` or ``"mean"``.
    """

    budget: PerHead = size(512, "B: keys of the prompt that stay, or a share of them")
    window: PerHead = number(32, "w: last queries of the prompt, which give the scores and whose keys stay", least=1)
    kernel: int = static(7, "positions that are pooled, an odd number", least=1, most=2**10)
    pool: str = choice("max", "mean", help="how scores of neighbours are pooled")

    def __post_init__(self):
        if self.kernel % 2 == 0:
            raise CormError(f"kernel must be odd, not {self.kernel}")
        if low := first_below(self.budget, self.window):
            raise CormError(f"a budget of {low[0]} keys is below the window of {low[1]}: raise it")

    @property
    def traits(self) -> Traits:
        return Traits(needs=("attention",), whole_prompt=True)

    def init(self, spec: CacheSpec) -> Scores:
        return Scores(jnp.zeros(spec.slots, jnp.float32), jnp.zeros(spec.slots, jnp.int32))

    def observe(self, state: Scores, observation: Observation, slots: Slots) -> Scores:
        t, begin = observation.seen, slots.prompt - slots.broadcast(self.window)
        judges = (t > begin) & (t <= slots.prompt)
        attention = jnp.where(judges, observation.mean, 0.0).sum(0)
        scores = self._current(state, slots) + attention
        if slots.reading:
            ends = ((t == slots.prompt) & (t <= slots.seen)).any()
            verdict = partial(jnp.where, ends)  # only in those rows of a batch whose prompt ends here
            scores = jax.lax.cond(anywhere(ends), lambda: verdict(self.verdict(scores, slots), scores), lambda: scores)
        return Scores(scores, jnp.broadcast_to(slots.prompt, scores.shape))

    def verdict(self, scores: Float[Array, "*slots"], slots: Slots) -> Float[Array, "*slots"]:
        """Pooled scores; `GONE` for the keys that do not stay."""
        early = slots.restrict(slots.live & self._early(slots))
        absent = GONE if self.pool == "max" else 0.0  # scores are not negative
        around = early.neighbours(scores, self.kernel // 2, absent)
        # Sorted before they are added, equal scores give equal sums in any order: ties are ties in every program.
        pooled = around.max(0) if self.pool == "max" else jnp.sort(around, axis=0).sum(0) / self.kernel
        over = early.sum_per_head(early.live) - self.allowed(pooled, early)
        return jnp.where(early.lowest(pooled, over), GONE, jnp.where(early.live, pooled, scores))

    def allowed(self, pooled: Float[Array, "*slots"], early: Slots) -> Int[Array, "..."]:
        """How many of a head's early keys stay."""
        return self.beside(early.prompt)

    def beside(self, prompt: Int[Array, ""] | int) -> Int[Array, "..."]:
        """How many keys stay beside the window, B - w, of a prompt that ends at this clock."""
        return jnp.maximum(held(self.budget, prompt) - jnp.asarray(self.window, jnp.int32), 0)

    def retain(self, state: Scores, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live & (self._current(state, slots) >= 0)

    def score(self, state: Scores, slots: Slots) -> Float[Array, "*slots"]:
        scores = self._current(state, slots)
        return jnp.where(self._early(slots), scores, largest(scores))

    def _current(self, state: Scores, slots: Slots) -> Float[Array, "*slots"]:
        """The scores that queries of this prompt gave; 0 where only those of an earlier one did."""
        return jnp.where(state.prompt == slots.prompt, state.score, 0.0)

    def _early(self, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.position < slots.prompt - slots.broadcast(self.window)
