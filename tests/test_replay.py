"""Replay against the specification, against the cache that it has never met, and against hand-worked numbers."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from corm_jax import TOVA, Corm, CormError, Full, L2Norm, budget
from corm_jax.traces.trace import Trace
from simulator import rules
from simulator.reading import read_head
from simulator.replay import FOREVER, replay, sweep
from simulator.verify import drive
from tests.heads import chunks_of, corm_last, heads, live_sets, options, padded
from tests.test_nine_tokens import KEPT, head, words

CLOSE = 1e-4


def trace_of(*columns):
    """A trace of one layer from heads ``(q [tokens, group, head_dim], k, v [tokens, head_dim])``."""
    q, k, v = (np.stack([column[i] for column in columns], axis=1) for i in range(3))
    return Trace.from_qkv(q.reshape(1, len(q), -1, q.shape[-1]), k[None], v[None])


def kept_sets(history):
    return [set(np.flatnonzero(row)) for row in history]


@settings(max_examples=60)
@given(head=heads(group=2), options=options(), how=st.sampled_from([(1, None), (1, 6), (2, 9), (5, None)]))
def test_same_keys_survive_as_in_the_specification(head, options, how):
    chunk, capacity = how
    tokens = head[0].shape[0]
    chunks = chunks_of(tokens, chunk)
    expected = corm_last(*head, **options, chunks=chunks, capacity=capacity)
    assume(expected.margin > CLOSE)
    result = replay(trace_of(head), Corm(**options), chunk=chunk, capacity=capacity, keep_history=True)
    ends = np.cumsum(chunks) - 1
    assert kept_sets(result.kept[0, 0][ends]) == expected.kept
    assert result.overflow[0, 0] == expected.overflow
    full = read_head(rules.Rule(), *head).outputs
    norm = np.linalg.norm(full, axis=-1)
    error = np.linalg.norm(expected.outputs - full, axis=-1) / np.where(norm == 0, 1, norm)
    np.testing.assert_allclose(result.error[0], error.T, atol=1e-4 * max(1.0, error.max()))


@settings(max_examples=40)
@given(pair=st.tuples(heads(group=2), heads(group=2)), options=options(), chunk=st.sampled_from([1, 5]))
def test_the_cache_and_the_replay_agree(pair, options, chunk):
    """Two accounts of the same mechanics: slots that are reused, and keys that only get a date."""
    tokens = min(head[0].shape[0] for head in pair)
    pair = [tuple(x[:tokens] for x in head) for head in pair]
    policy = Corm(**options)
    q, k, v = (np.stack([padded(head[i], chunk) for head in pair], axis=1) for i in range(3))
    _, position, last = drive(policy, q, k, v, tokens, capacity=9, chunk=chunk)
    result = replay(trace_of(*pair), policy, capacity=9, chunk=chunk, keep_history=True)
    for h in range(2):
        ends = np.cumsum(chunks_of(tokens, chunk)) - 1
        cached = [live_sets(p[h]) for p in np.asarray(position)[: len(ends)]]
        assert kept_sets(result.kept[0, h][ends]) == cached
    np.testing.assert_array_equal(result.overflow[0], last.overflow)


@settings(max_examples=40)
@given(head=heads(), options=options(), how=st.sampled_from([(1, None), (3, 7)]))
def test_every_number_follows_from_the_history(head, options, how):
    """Counts, mass, lifetimes and regrets, recomputed from the kept sets in NumPy."""
    chunk, capacity = how
    q, k, _ = head
    tokens = len(q)
    result = replay(trace_of(head), Corm(**options), chunk=chunk, capacity=capacity, keep_history=True)
    kept, until = result.kept[0, 0], result.until[0, 0]
    np.testing.assert_array_equal(result.live[0, 0], kept.sum(-1))
    np.testing.assert_array_equal(kept[-1], until == FOREVER)
    logits = np.einsum("tgd,id->gti", q, k, dtype=np.float64) / 2
    logits[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    alpha = np.exp(logits - logits.max(-1, keepdims=True))
    alpha /= alpha.sum(-1, keepdims=True)
    clock = np.arange(1, tokens + 1)
    attended = (np.arange(tokens) < clock[:, None]) & (until >= clock[:, None])
    np.testing.assert_array_equal(result.attended[0, 0], attended.sum(-1))
    np.testing.assert_array_equal(result.lifetime[0, 0], attended.sum(0))
    np.testing.assert_allclose(result.mass[0], (alpha * attended).sum(-1), atol=1e-5)
    ratio = alpha * clock[:, None]
    assume((np.abs(ratio - 1) > CLOSE)[(np.abs(ratio - 1) > 1e-12)].all())
    important = (ratio >= 1 - 1e-12).any(0)
    needed = (important * clock[:, None]).max(0)
    np.testing.assert_array_equal(result.needed[0, 0], needed)
    np.testing.assert_array_equal(result.regretted[0, 0], needed > until)


@settings(max_examples=40)
@given(head=heads(group=2), options=options(), fidelity=st.sampled_from(["renormalized", "recorded"]))
def test_attention_rows_replay_as_the_keys_they_came_from(head, options, fidelity):
    q, k, _ = head
    tokens = len(q)
    logits = np.einsum("tgd,id->gti", q, k, dtype=np.float64) / 2
    logits[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    alpha = np.exp(logits - logits.max(-1, keepdims=True))
    alpha /= alpha.sum(-1, keepdims=True)
    assume(corm_last(*head, **options).margin > CLOSE)
    ratio = alpha * np.arange(1, tokens + 1)[:, None]
    assume((np.abs(ratio - 1) > CLOSE).all() or options["window"] > tokens)  # rows do not say which ties are exact
    rows = replay(Trace.from_attention(alpha[None], kv_heads=1), Corm(**options), fidelity=fidelity)
    keys = replay(trace_of(head), Corm(**options), fidelity=fidelity)
    np.testing.assert_array_equal(rows.until, keys.until)
    np.testing.assert_allclose(rows.mass, keys.mass, atol=1e-5)
    assert rows.error is None


@settings(max_examples=20)
@given(head=heads(group=2))
def test_a_sweep_is_each_replay(head):
    grid = {"window": [1, 3, 5, 40], "recent": [1, 4]}
    grids = sweep(trace_of(head), Corm, grid, capacity=9, errors=True)
    for a, window in enumerate(grid["window"]):
        for b, recent in enumerate(grid["recent"]):
            alone = replay(trace_of(head), Corm(window=window, recent=recent), capacity=9)
            np.testing.assert_array_equal(grids.until[a, b], alone.until)
            np.testing.assert_array_equal(grids.lost[a, b], alone.lost)
            np.testing.assert_allclose(grids.mass[a, b], alone.mass, atol=1e-6)
            np.testing.assert_allclose(grids.error[a, b], alone.error, atol=1e-5)


@pytest.mark.parametrize("group", ["any", "mean"])
@pytest.mark.parametrize("threshold", ["position", "live"])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    peak=st.integers(0, 4),
    scale=st.sampled_from([1, 20, 300]),
    ties=st.booleans(),
)
@example(seed=50, peak=0, scale=20, ties=False)  # 3 of 3 keys, of which one has all the weight
def test_a_grid_in_blocks_is_the_specification(threshold, group, seed, peak, scale, ties):
    """All points share exponentials, in blocks of 16: of equal logits, and of those far apart."""
    rng, tokens = np.random.default_rng(seed), 40
    q, k, v = (rng.normal(size=(tokens, heads, 4)) for heads in (2, 1, 1))
    if ties:
        q, k = rng.integers(-peak, peak + 1, q.shape), rng.integers(-2, 3, k.shape).astype(float)
    head = tuple(np.asarray(x, np.float32) for x in (scale * q, k[:, 0], v[:, 0]))
    grid = {"window": [16, 21], "recent": [1, 4], "multiple": [1, 3], "eager": [False, True]}
    result = sweep(trace_of(head), partial(Corm, threshold=threshold, group=group), grid)
    close = 0
    for index, point in enumerate(itertools.product(*grid.values())):
        options = dict(zip(grid, point, strict=True))
        expected = corm_last(*head, threshold=threshold, group=group, **options)
        close += expected.margin <= CLOSE
        if expected.margin > CLOSE:
            one = jax.tree.map(lambda x, at=index: x.reshape(16, *x.shape[4:])[at], result)
            assert kept_sets(one.history()[0, 0]) == expected.kept, options
    assume(close < 16)


def test_blocks_and_segments_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    trace = Trace.from_qkv(*(rng.normal(size=(2, 150, heads, 4)) for heads in (4, 2, 2)))
    policies = [Corm(window=20, recent=5), Full()]
    one = replay(trace, policies, capacity=60, chunk=3)
    monkeypatch.setattr("simulator.replay.STEPS_PER_BLOCK", 16)
    monkeypatch.setattr("simulator.recurrence.SEGMENTS", 3)
    other = replay(trace, policies, capacity=60, chunk=3)
    for name, x, y in zip(one._fields, one, other, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name) if isinstance(x, np.ndarray) else None
    assert one.about == other.about
    assert one.overflow[1].tolist() == [90, 90]  # the full cache of 150 in 60 slots
    assert (one.overflow[0] > 0).all()


def test_a_full_cache_loses_nothing():
    rng = np.random.default_rng(0)
    result = replay(Trace.from_qkv(*(rng.normal(size=(1, 70, heads, 4)) for heads in (2, 1, 1))), Full())
    np.testing.assert_allclose(result.mass, 1, atol=1e-6)
    np.testing.assert_allclose(result.error, 0, atol=1e-6)
    assert not result.regretted.any()
    np.testing.assert_array_equal(result.live[0, 0], np.arange(1, 71))


def test_the_nine_tokens_replay():
    result = replay(trace_of(head()), Corm(window=4, recent=2), keep_history=True)
    assert [words(kept) for kept in kept_sets(result.kept[0, 0])] == KEPT
    assert replay(trace_of(head()), Corm(window=4, recent=2)).kept is None
    # Query 8 asked for The, cat and it, a third each; cat had gone after query 7.
    np.testing.assert_allclose(result.mass[0, 0, 7], 2 / 3, atol=1e-6)
    assert np.flatnonzero(result.regretted[0, 0]).tolist() == [1]
    assert result.lifetime[0, 0].tolist() == [9, 6, 6, 6, 3, 4, 3, 2, 1]


def test_the_logit_scale_of_the_trace_counts():
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, 40, heads, 4)) for heads in (2, 1, 1))
    policy = Corm(window=5, recent=2)
    twice, same = (replay(Trace.from_qkv(f * q, k, v, scale=s), policy) for f, s in ((2, 0.25), (1, 0.5)))
    np.testing.assert_array_equal(twice.until, same.until)
    assert (replay(Trace.from_qkv(q, k, v, scale=2.0), policy).until != same.until).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fidelity": "live"}, "fidelity must be 'renormalized' or 'recorded', not 'live'"),
        ({"chunk": 0}, "chunk must be a whole number from 1 to 2147483647, not 0"),
        ({"chunk": 2.5}, "chunk must be a whole number"),
        ({"capacity": 2**31}, "capacity must be a whole number"),
        ({"capacity": 3}, "capacity 3 cannot hold the keys that the policy never evicts"),
        ({"capacity": 4, "chunk": 50}, r"capacity 4 cannot hold a chunk \(8 keys\)"),
    ],
)
def test_what_cannot_work_is_said(arguments, message):
    trace = Trace.from_qkv(*(np.ones((1, 8, 1, 2)) for _ in range(3)))
    with pytest.raises(CormError, match=message):
        replay(trace, Corm(window=4, recent=4), **arguments)


def test_a_grid_may_be_of_policies_without_numbers():
    result = sweep(
        trace_of(tuple(np.ones((5, *rest)) for rest in ((1, 4), (4,), (4,)))), lambda turn: Full(), {"turn": [1, 2]}
    )
    assert result.live[:, 0, 0].tolist() == [[1, 2, 3, 4, 5]] * 2


def test_a_grid_must_be_one_program():
    trace = Trace.from_qkv(*(np.ones((1, 8, 1, 2)) for _ in range(3)))
    with pytest.raises(CormError, match="sweep each value by itself"):
        sweep(trace, Corm, {"group": ["any", "mean"]})
    for grid in ({"window": []}, {"window": 4}):
        with pytest.raises(CormError, match="give a list of at least one value for each name"):
            sweep(trace, Corm, grid)
    with pytest.raises(CormError, match="the grid is empty"):
        sweep(trace, Corm, {})
    with pytest.raises(CormError, match="2 policies for 1 layers"):
        replay(trace, [Full(), Full()])


@pytest.mark.parametrize(
    ("trace", "policy", "message"),
    [
        ("trace", Full(), "'trace' is not a Trace: read one with Trace.open"),
        (None, "corm", r"'corm' is not a policy: give an object such as Corm\(window=64\)"),
        (None, Corm, "is not a policy: give an object"),
        (
            None,
            Corm(window=np.array([1, 2, 3])),
            r"Corm.window has the shape \(3,\): give a number, or one for each of the 1",
        ),
    ],
)
def test_what_is_no_trace_or_policy_is_said(trace, policy, message):
    trace = trace or Trace.from_qkv(*(np.ones((1, 8, 1, 2)) for _ in range(3)))
    with pytest.raises(CormError, match=message):
        replay(trace, policy)


def test_a_grid_may_mix_numbers_and_heads():
    rng = np.random.default_rng(0)
    trace = Trace.from_qkv(*(rng.normal(size=(1, 40, heads, 4)) for heads in (2, 2, 2)))
    grid = sweep(trace, Corm, {"window": [np.array([3, 9]), 9], "recent": [2]})
    np.testing.assert_array_equal(grid.until[0, 0, 0, 1], grid.until[1, 0, 0, 1])
    assert (grid.until[0, 0, 0, 0] != grid.until[1, 0, 0, 0]).any()


def test_one_class_is_not_taken_for_another():
    """JAX's own registration of dataclasses would make `jax.jit` confuse them."""
    structures = [jax.tree.structure(budget(policy, 5)) for policy in (TOVA(), L2Norm(), Full())]
    assert len({*structures}) == 3
    assert all(one != other for one, other in itertools.combinations(structures, 2))


def test_short_forms():
    rng = np.random.default_rng(0)
    trace = Trace.from_qkv(*(rng.normal(size=(2, 70, heads, 4)) for heads in (4, 2, 2)))
    full = replay(trace, Full(), capacity=30, errors=False)
    assert repr(full).startswith("Replay(Full(), layers=2, kv_heads=2, steps=70, kept=0.429, mass=")
    assert repr(full).endswith(", overflow=160)")
    grid = sweep(trace, Corm, {"window": [2, 90], "recent": [3]})
    shares = [(grid.until[i, 0] == FOREVER).mean() for i in (0, 1)]
    assert f"grid=(2, 1), layers=2, kv_heads=2, steps=70, kept={shares[0]:.3f}..1.000, mass=" in repr(grid)
    assert len(repr(full)) < 130
    for other in (jax.tree.map(np.shape, full), jax.tree.map(jax.numpy.sum, full), full._replace(until=None)):
        assert repr(other).startswith("Replay(")
