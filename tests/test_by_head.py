"""A policy that remembers something of each head beside what it remembers of each slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import CacheSpec, OfHead, Policy, Traits, make_cache, policy, step
from corm_jax.policies import number
from simulator.reading import read_head
from simulator.rules import Rule
from simulator.subject import Implementation
from simulator.testing import parametrize_checks
from tests.checks import quick
from tests.drive import GROUP, HEAD_DIM, KV_HEADS, TOKENS, normal


class Shares(NamedTuple):
    """What each key has drawn, and how many queries each head has answered."""

    drawn: jax.Array
    asked: OfHead


@policy
class BelowTheMean(Policy):
    """Evicts keys that drew less than a share of the attention of all queries of their head."""

    recent: int = number(2, "newest that stay", least=1)
    least: int = number(100, "thousandths of the attention of all queries", least=0)

    @property
    def traits(self):
        return Traits(protected=self.recent, recent=self.recent, needs=("attention",))

    def init(self, spec):
        return Shares(jnp.zeros(spec.slots, jnp.float32), OfHead(jnp.zeros(spec.kv_heads, jnp.int32)))

    def observe(self, state, observation, slots):
        asked = slots.sum_per_head((observation.weights > 0).any(0)) > 0  # [tokens, kv_heads]
        drawn = state.drawn + observation.probability.mean(0).sum(0)
        return Shares(drawn, OfHead(state.asked.value + asked.sum(0, dtype=jnp.int32)))

    def retain(self, state, slots):
        least = slots.broadcast(self.least * state.asked.value.astype(jnp.float32) / 1000)
        return slots.live & ((state.drawn >= least) | slots.newest(self.recent))

    def score(self, state, slots):
        return jnp.where(slots.newest(self.recent), jnp.inf, state.drawn)


class BelowTheMeanRule(Rule):
    def __init__(self, *, recent, least):
        self.recent, self.least, self.drawn, self.asked = recent, least, {}, 0

    def attended(self, t, head, rows):
        self.asked += 1
        for i in rows[head][0]:
            self.drawn[i] = self.drawn.get(i, 0.0) + sum(row[i] for row in rows[head]) / len(rows[head])

    def keeps(self, live, t):
        for i in live:
            bar = self.least * self.asked / 1000
            self.margin = min(self.margin, abs(self.drawn[i] - bar) / max(bar, 1e-9) if not self.exempt(i, t) else 1)
        return [i for i in live if self.exempt(i, t) or self.drawn[i] >= self.least * self.asked / 1000]

    def order(self, i, t):
        return self.drawn[i]

    def exempt(self, i, t):
        return i + 1 > t - self.recent


def reference(q, k, v, *, recent, least, **how):
    return read_head(BelowTheMeanRule(recent=recent, least=least), q, k, v, **how)


@quick(parametrize_checks(BelowTheMean(recent=2, least=103), reference=reference, examples=6))
def test_conformance(check):
    check()


@pytest.mark.nightly
@parametrize_checks(BelowTheMean(recent=2, least=103), implementation=Implementation(stores=1), examples=4)
def test_conformance_in_pools(check):
    check()


def test_what_a_head_remembers_outlives_its_keys():
    """Every query counts, although most of its keys are evicted later; a slot that is reused starts from 0."""
    policy_, (q, k, v) = BelowTheMean(recent=1, least=400), map(jnp.asarray, normal(4))
    cache = make_cache(policy_, CacheSpec(KV_HEADS, 4, HEAD_DIM))
    for t in range(TOKENS):
        _, cache = jax.jit(step)(policy_, cache, q[t : t + 1], k[t : t + 1], v[t : t + 1], 1)
    assert cache.state.asked.value.tolist() == [TOKENS] * KV_HEADS
    assert q.shape[2] == GROUP
    newest = np.asarray(cache.position) == TOKENS - 1
    assert (np.asarray(cache.state.drawn)[newest] <= 1).all()
