"""TOVA whose heads do not keep the same tokens: a mean over heads goes by position, not by slot."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corm_jax import TOVA, budget, protect
from corm_jax.policies import Budget
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from simulator.subject import Implementation
from simulator.testing import parametrize_checks
from tests.checks import quick
from tests.drive import TOKENS, in_cache, in_numpy, normal
from tests.heads import chunks_of, slots_of

UNEQUAL = budget(protect(TOVA(), sinks=np.array([0, 2], np.int32)), 5)


@quick(parametrize_checks(UNEQUAL, examples=5))
def test_conformance(check):
    check()


@pytest.mark.slow
@parametrize_checks(UNEQUAL, implementation=Implementation(stores=1), examples=3)
def test_conformance_in_a_pool(check):
    check()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    sinks=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    recent=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    tokens=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    chunk=st.sampled_from([1, 3]),
    capacity=st.sampled_from([None, 9]),
)
def test_heads_with_sinks_and_budgets_of_their_own(seed, sinks, recent, tokens, chunk, capacity):
    """In a rectangle, in a pool, and in a replay: the keys of the specification."""
    sinks, recent = (np.array(x, np.int32) for x in (sinks, recent))
    tokens = np.maximum(np.array(tokens, np.int32), sinks + recent)
    policy, columns = Budget(policy=protect(TOVA(), sinks=sinks, recent=recent), tokens=tokens), normal(seed)
    counts = chunks_of(TOKENS, chunk)
    for stores in (None, 1):
        how = {"stores": stores} | ({"capacity": capacity} if capacity else {})
        expected = in_numpy(policy, *columns, counts, **how)
        assume(min(reading.margin for reading in expected) > 1e-4)
        outputs, held, last = in_cache(policy, *columns, counts, **how)
        assert held == [reading.kept for reading in expected]
        assert last.overflow.tolist() == [reading.overflow for reading in expected]
        np.testing.assert_allclose(outputs.swapaxes(0, 1), [reading.outputs for reading in expected], atol=2e-5)
    q, k, v = columns
    trace = Trace.from_qkv(q.reshape(1, TOKENS, -1, q.shape[-1]), k[None], v[None])
    kept = replay(trace, policy, chunk=chunk, capacity=capacity, errors=False).history()[0, :, np.cumsum(counts) - 1]
    expected = in_numpy(policy, *columns, counts, capacity=capacity)
    assert [[set(np.flatnonzero(row)) for row in kept[:, h]] for h in range(2)] == [one.kept for one in expected]


POSITIONS = {  # the same keys, head by head and in a pool; token 0 is missing in head 1
    "rectangle": (np.array([[0, 1], [-1, 1]]), None, np.array([[4.0, 2.0], [np.nan, 6.0]])),
    "another order": (np.array([[1, 0], [1, -1]]), None, np.array([[2.0, 4.0], [6.0, 9.0]])),
    "pool": (np.array([0, 1, 1, -1]), np.array([0, 0, 1, 0]), np.array([4.0, 2.0, 6.0, 0.0])),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_mean_by_hand(name):
    """Token 0: 4 and nothing; token 1: 2 and 6."""
    position, owner, value = POSITIONS[name]
    slots = slots_of(position, owner, seen=2)
    mean = np.asarray(slots.mean_over_heads(jnp.asarray(value, jnp.float32).reshape(slots.position.shape)))
    assert {(int(p), float(x)) for p, x in zip(position.flat, mean.flat, strict=True) if p >= 0} == {(0, 2.0), (1, 4.0)}


def test_what_is_not_a_number_counts_as_nothing():
    """One of two heads has NaN: half of the other's 6 is the mean, for equal and for different slots."""
    for position in ([[0, 1], [0, 1]], [[0, 1], [1, 0]]):
        value = np.where(np.array(position) == 1, np.array([[np.nan], [6.0]]), 1.0)
        slots = slots_of(position, seen=2)
        mean = np.asarray(slots.mean_over_heads(jnp.asarray(value, jnp.float32)))
        assert mean.tolist() == np.where(np.array(position) == 1, 3.0, 1.0).tolist()
