"""The bounds hold each other: greedy <= exact <= most, exact by brute force and by linear programming."""

from functools import cache
from itertools import combinations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corm_jax import Corm, CormError, Full
from corm_jax.traces.trace import Trace
from simulator import oracle, synthetic
from simulator.replay import replay


@st.composite
def heads(draw, most_steps):
    """Attention rows of a head, and a number of keys for each query, as some policy may have had them."""
    steps = draw(st.integers(1, most_steps))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    alpha = np.tril(rng.integers(0, 5, (steps, steps)) + 1e-3)
    n = [1]
    for _ in range(steps - 1):
        n.append(draw(st.integers(1, n[-1] + 1)))
    return (alpha / alpha.sum(-1, keepdims=True)).astype(np.float32), np.array(n)


def brute_force(alpha, n):
    """Tries every set of survivors at every step."""

    @cache
    def best(t, held):
        if t == len(n):
            return 0.0
        options = (
            frozenset(kept) | {t}
            for size in range(min(len(held), n[t] - 1) + 1)
            for kept in combinations(sorted(held), size)
        )
        return max(float(alpha[t, sorted(held)].sum(dtype=np.float64)) + best(t + 1, held) for held in options)

    return best(0, frozenset())


@given(head=heads(7))
def test_the_linear_programme_finds_the_optimum(head):
    assert oracle.exact(*head) == pytest.approx(brute_force(*head), abs=1e-5)


@given(head=heads(24))
def test_the_optimum_is_between_the_bounds(head):
    alpha, n = head
    exact = oracle.exact(alpha, n)
    assert oracle.greedy(alpha, n).sum() <= exact + 1e-4
    assert exact <= oracle.most(alpha, n).sum() + 1e-4


@pytest.mark.parametrize(
    ("kind", "pattern"), [("qkv", "noise"), ("qkv", "topics"), *(("attention", name) for name in synthetic.PATTERNS)]
)
def test_no_policy_beats_them(pattern, kind):
    trace = synthetic.PATTERNS[pattern](layers=2, steps=120, group=2)
    if kind == "attention":
        rows = [np.stack(list(oracle.attention(trace, layer))) for layer in range(2)]
        trace = Trace.from_attention(np.stack(rows))
    for capacity in (None, 24):
        result = replay(trace, Corm(window=12, recent=4), capacity=capacity)
        found = oracle.bounds(trace, result)
        assert (found.policy <= found.most + 1e-4).all()
        assert (found.regret >= -1e-4).all()
        assert (found.greedy <= found.most + 1e-4).all()
        alpha = next(oracle.attention(trace, 0))
        exact = oracle.exact(alpha, result.attended[0, 0])
        assert found.policy[0, 0].sum() <= exact + 1e-3
        assert found.greedy[0, 0].sum() <= exact + 1e-3
        assert exact <= found.most[0, 0].sum() + 1e-3


def test_all_keys_are_all_the_mass():
    trace = synthetic.noise(layers=1, steps=50)
    found = oracle.bounds(trace, replay(trace, Full()))
    for mass in found[:3]:
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_short_form():
    trace = synthetic.noise(layers=2, steps=40)
    found = oracle.bounds(trace, replay(trace, Corm(window=5, recent=2)))
    means = ", ".join(f"{name}={getattr(found, name).mean():.3f}" for name in ("policy", "most", "greedy"))
    assert repr(found) == f"Bounds(layers=2, kv_heads=2, steps=40, {means})"
    assert repr(oracle.Bounds(1, 2, 3)) == "Bounds(1, 2, 3)"


def test_the_upper_bound_is_tight():
    """One key for query 1: its own. Two for query 2: its own (0.1) and the heavier of the others (0.7)."""
    alpha = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.7, 0.1]], np.float32)
    np.testing.assert_allclose(oracle.most(alpha, np.array([1, 1, 2])), [1, 0.5, 0.8], atol=1e-7)


def test_rows_that_were_rounded_to_16_bits_sum_to_one():
    """As recorded, three thirds in bfloat16 are 1.002: the bounds, like a replay, take shares of that sum."""
    thirds = np.tril(np.ones((1, 2, 3, 3))) / np.arange(1, 4)[:, None]
    trace = Trace.from_attention(thirds.astype(ml_dtypes.bfloat16), kv_heads=1)
    assert trace.layer(0).probs[0, 2].sum() > 1.001
    (alpha,) = oracle.attention(trace, 0)
    np.testing.assert_allclose(alpha, thirds[0, 0], atol=1e-6)
    for mass in oracle.bounds(trace, replay(trace, Full()))[:3]:
        np.testing.assert_allclose(mass, 1, atol=1e-6)


def test_the_most_steps_are_still_within_reach(monkeypatch):
    monkeypatch.setattr(oracle, "EXACT_STEPS", 3)
    assert oracle.exact(np.eye(3), np.ones(3, int)) == pytest.approx(3)
    with pytest.raises(CormError, match="the exact optimum is computed for at most 3 steps, not 4"):
        oracle.exact(np.eye(4), np.ones(4, int))


def test_layers_that_are_done_are_told():
    trace, done = synthetic.noise(layers=2, steps=8), []
    oracle.bounds(trace, replay(trace, Full(), progress=done.append), progress=done.append)
    assert done == [1, 2, 1, 2]


@pytest.mark.parametrize("scale", [None, 0.1])
def test_attention_is_the_mean_over_a_group_at_the_scale_of_the_trace(scale):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 6, heads, 4)) for heads in (4, 2, 2))
    found = [*oracle.attention(Trace.from_qkv(q, k, v, scale=scale), 0)]
    for head in range(2):
        weights = np.exp(np.einsum("qgd,kd->gqk", q[0, :, 2 * head : 2 * head + 2], k[0, :, head]) * (scale or 0.5))
        weights = np.tril(weights)
        expected = (weights / weights.sum(-1, keepdims=True)).mean(0)
        np.testing.assert_allclose(found[head], expected, atol=1e-6)
    assert len(found) == 2


def test_by_hand():
    """Two keys each; query 2 wants key 0, query 3 key 1, query 4 key 0 again."""
    alpha = np.array(
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0.8, 0, 0.2, 0, 0], [0, 0.6, 0, 0.4, 0], [0.9, 0, 0, 0, 0.1]], np.float32
    )
    n = np.array([1, 2, 2, 2, 2])
    np.testing.assert_allclose(oracle.most(alpha, n), [1, 1, 1, 1, 1], atol=1e-6)
    # Key 0 (1.7 to come) stays, key 1 (0.6 to come) goes when token 2 arrives; then 2 and 3 make room in turn.
    np.testing.assert_allclose(oracle.greedy(alpha, n), [1, 1, 1, 0.4, 1], atol=1e-6)
    assert oracle.exact(alpha, n) == pytest.approx(4.4)


def test_what_cannot_work_is_said():
    trace = synthetic.noise(layers=1, steps=20)
    with pytest.raises(CormError, match="does not belong to a trace"):
        oracle.bounds(trace.part(steps=10), replay(trace, Full()))
    with pytest.raises(CormError, match="at most 300"):
        oracle.exact(np.eye(301, dtype=np.float32), np.ones(301, int))
