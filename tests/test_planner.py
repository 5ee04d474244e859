"""Plans: sizes worked out by hand, files, and what they are refused for; pools that they size."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corm_jax import CormError, parse
from corm_jax.policies.plan import Plan
from corm_jax.runs.perplexity import read_text
from corm_jax.traces.trace import Trace
from simulator import planner
from simulator.replay import Replay
from simulator.synthetic import noise
from tests.models import tiny

PLAN = Plan(
    model="m", policy="corm:window=4,recent=2", kv_heads=2, head_dim=8, chunk=3, tokens=9, overflow=0.1, capacity=(5, 6)
)


def test_what_chunks_want():
    """Two heads, chunks of two; key 0 of head 0 is evicted after clock 2, key 1 of head 1 after clock 4."""
    until = np.full((1, 2, 5), np.iinfo(np.int32).max, np.int32)
    until[0, 0, 0], until[0, 1, 1] = 2, 4
    nothing = np.zeros((1, 2, 5))
    result = Replay(until, nothing.astype(bool), nothing, None, until)
    assert planner.wanted(result, 2).tolist() == [[4, 4 - 1 + 4, 8 - 2 + 2]]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 30))
def test_smallest(need, allowed):
    need = np.array(need)
    slots = planner.smallest(need, allowed)
    assert np.maximum(need - slots, 0).sum() <= allowed
    assert slots == 0 or np.maximum(need - (slots - 1), 0).sum() > allowed


def test_several_traces():
    traces = [noise(layers=2, steps=48, seed=seed) for seed in (0, 1)]
    both = planner.plan(traces, "corm:window=4,recent=2", chunk=4)
    alone = [planner.plan([trace], "corm:window=4,recent=2", chunk=4) for trace in traces]
    assert both.capacity == tuple(map(max, *(one.capacity for one in alone)))


def test_a_trace_in_bfloat16_plans_for_the_same_model():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 24, 2, 8))
    trace = Trace.from_qkv(q, k, v, model="some/model (bfloat16)")
    assert planner.plan([trace], "corm:window=4,recent=2", chunk=4).model == "some/model"


def test_files(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_short_form():
    assert repr(PLAN) == (
        "Plan(model='m', policy='corm:window=4,recent=2', kv_heads=2, tokens=9, chunk=3, overflow=0.1, layers=2, "
        "capacity=5..6)"
    )
    assert repr(dataclasses.replace(PLAN, capacity=(7,) * 30)).endswith("layers=30, capacity=7)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "format: Input should be 'corm-jax plan 1', not 'another': make one with"),
        ({"capacity": [5, 0]}, "slots a head of layer 1: must be from 1 to 2147483647, not 0"),
        ({"chunk": "3"}, "chunk: Input should be a valid integer, not '3'"),
        ({"extra": 1}, "extra: Unexpected keyword argument, not 1"),
    ],
)
def test_bad_files(tmp_path, change, message):
    PLAN.save(path := tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CormError, match=message):
        Plan.load(path)


def test_another_model():
    model = tiny()
    with pytest.raises(CormError, match="the plan is for 2 layers of 2 key-value heads of 8"):
        PLAN.check("m", dataclasses.replace(model.config, layers=7))
    fits = dataclasses.replace(model.config, layers=2, kv_heads=2, head_dim=8)
    PLAN.check("m", fits)
    with pytest.raises(CormError, match="for 'm', not 'n'"):
        PLAN.check("n", fits)


def test_spare():
    exact, more = (planner.plan([noise(layers=2, steps=48)], "corm:window=4,recent=2", spare=s) for s in (0.0, 0.1))
    assert more.capacity == tuple(math.ceil(slots * 1.1) for slots in exact.capacity)


@pytest.mark.parametrize("options", [{"overflow": 1.0}, {"overflow": -0.1}, {"spare": -0.1}])
def test_bad_shares(options):
    with pytest.raises(CormError, match="share"):
        planner.plan([noise(layers=1, steps=8)], "corm:window=4,recent=2", **options)
    with pytest.raises(CormError, match="no trace"):
        planner.plan([], "corm:window=4,recent=2")


def test_pools_of_their_own_size():
    """A pool for each layer, as large as is needed, reads as rectangles do that hold every key."""
    model, policy = tiny(), parse("corm:window=6,recent=3")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, 60).tolist()
    free = read_text(model, policy, tokens, chunk=4)
    capacity = [int(-(-(layer.sum(-1).max()) // model.config.kv_heads)) + 4 for layer in free.live]
    pooled = read_text(model, policy, tokens, chunk=4, capacity=capacity, stores=1)
    np.testing.assert_array_equal(pooled.live, free.live)
    np.testing.assert_allclose(pooled.nll, free.nll, atol=1e-4)
    assert int(pooled.usage.overflow.sum()) == 0
    assert pooled.usage.bytes_allocated < free.usage.bytes_allocated
    assert pooled.usage.bytes_live == free.usage.bytes_live
