"""CORM: a key that none of the last w queries found important is evicted (arXiv 2404.15949).

With ``alpha_t[i]`` the attention of query t to key i over the keys still live, t counting from 1:

    important_t[i]  =  alpha_t[i] >= m/t        (m = 1)
    last[i]         =  t  where important_t[i],  else unchanged      (never: the smallest int32)
    if t >= w:  evict every i with  last[i] <= t - w  and  position[i] < t - r      (positions from 0)

The paper (section 4, algorithm 1) keeps a w x n matrix of messages, whose row t says which keys query t found
important, and evicts the columns that are all zero. One integer a key says the same: a column of the last w rows is
empty exactly if ``last[i] <= t - w``. The paper leaves grouped-query attention, chunked prompts and full caches open;
the options below and the overflow rule (the least recently important key is evicted first, the newest r never are)
answer these questions.
With a ``multiple`` m above the paper's 1 fewer keys are important, which makes room for a wider window.

Verdicts are float32: ``weight >= m total / t``, where the weights of equal logits are 1 and their total is exact,
so that exact ties are ties as long as t < 2^24. Beyond, t is rounded to 24 bits, by at most 6e-8 of itself, which is no
more than alpha is rounded: it changes a verdict only where alpha t / m is that near to 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from corm_jax.core.arrays import ENDLESS, over_group
from corm_jax.core.observation import Observation, last
from corm_jax.core.options import choice, number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec

NEVER = jnp.iinfo(jnp.int32).min
PROTECTED = jnp.iinfo(jnp.int32).max


@policy
class Corm(Policy):
    """Evict what none of the last w queries found important; keep the newest r.

    Args:
      window: w, in queries. A number, or one for each head (int32 ``[kv_heads]``); may be traced.
      recent: r, in tokens. Likewise.
      multiple: m. Likewise.
      threshold: ``"position"`` compares alpha with m/t, t tokens seen; ``"live"`` with m/n, n keys attended.
      group: under grouped-query attention a key is important to its group if it is to ``"any"`` query head, or
        in the ``"mean"`` of their probabilities.
      eager: judge on the queries there are when fewer than w were seen, instead of evicting nothing. A truth value, or
        one for each head.

    >>> import jax
    >>> corm = Corm(window=64, recent=32)
    >>> jax.tree.leaves(corm), corm.group
    ([64, 32, 1, False], 'any')
    """

    window: PerHead = number(256, "w: queries whose verdict counts", least=1)
    recent: PerHead = number(256, "r: newest keys that are never evicted", least=1)
    multiple: PerHead = number(1, "m: how many times 1/n of the attention makes a key important", least=1)
    threshold: str = choice("position", "live", help="a key is important at alpha >= m / (tokens seen | keys live)")
    group: str = choice("any", "mean", help="important to any query head of the group | in their mean")
    eager: PerHead = number(False, "evict before w queries were seen")

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.recent, recent=self.recent, needs=("attention",), moments=self.window)

    def init(self, spec: CacheSpec) -> Int[Array, "*slots"]:
        return jnp.full(spec.slots, NEVER, jnp.int32)

    def observe(self, state: Int[Array, "*slots"], observation: Observation, slots: Slots) -> Int[Array, "*slots"]:
        return self.noted(state, self.important(observation, slots), observation.seen)

    def noted(
        self, state: Int[Array, "*slots"], important: Bool[Array, "tokens *slots"], seen: Int[Array, "tokens *ones"]
    ) -> Int[Array, "*slots"]:
        """``last``, after queries at these clocks found these keys important."""
        return jnp.maximum(state, last(important, seen, NEVER))

    def moment(self, state: Int[Array, "*slots"], slots: Slots) -> Int[Array, "*slots"]:
        """max(last + w, position + r + 1, w): the clock at which the key is evicted, unless it is important by then."""
        window, recent = slots.broadcast(self.window), slots.broadcast(self.recent)
        eager = slots.broadcast(self.eager)
        forgotten = jnp.where(state > 0, jnp.minimum(state, ENDLESS - window) + window, 0)
        old = jnp.minimum(slots.position, ENDLESS - 1 - recent) + recent + 1
        return jnp.maximum(jnp.maximum(forgotten, old), jnp.where(eager, 0, window))

    def important(self, observation: Observation, slots: Slots) -> Bool[Array, "tokens *slots"]:
        """Which keys each query found important."""
        n = observation.seen
        if self.threshold == "live":
            n = slots.broadcast(slots.sum_per_head(observation.visible))
        least, n = slots.broadcast(self.multiple).astype(jnp.float32), n.astype(jnp.float32)
        if self.group == "any":
            return over_group(jnp.logical_or, observation.weights >= least * observation.total / n)
        ratio = observation.weights * (n / observation.total)  # alpha n
        return over_group(jnp.add, ratio) / len(ratio) >= least

    def retain(self, state: Int[Array, "*slots"], slots: Slots) -> Bool[Array, "*slots"]:
        window = slots.broadcast(self.window)
        eager = slots.broadcast(self.eager)
        minor = (state <= slots.seen - window) & ((slots.seen >= window) | eager)
        return slots.live & (~minor | slots.newest(self.recent))

    def score(self, state: Int[Array, "*slots"], slots: Slots) -> Int[Array, "*slots"]:
        return jnp.where(slots.newest(self.recent), PROTECTED, state)
