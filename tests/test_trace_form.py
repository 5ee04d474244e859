"""Traces of attention with slopes, a soft cap and windows: replay, cache and specification decide alike."""

import numpy as np
import pytest

from corm_jax import Corm, parse
from corm_jax.traces.trace import Trace
from simulator import oracle
from simulator.replay import replay, sweep
from simulator.verify import verify

LAYERS, STEPS, KV_HEADS, GROUP, HEAD_DIM = 3, 30, 2, 2, 8
SLOPES = (0.5, 0.25, 0.125, 0.0625)
FORMS = {
    "alibi": {"slopes": SLOPES},
    "local": {"windows": (7, None, 12), "scale": 0.5},
    "all": {"slopes": SLOPES, "windows": (None, 7, None), "softcap": 5.0, "scale": 0.5},
}
SPECS = [
    "corm:window=6,recent=2,threshold=live",
    "h2o:recent=2,budget=9",
    "tova:budget=9",
    "streaming_llm:sinks=2,budget=9",
    "snapkv:budget=9,window=4,kernel=3",
    "pyramidkv:budget=9,window=4,kernel=3",
]


def made(form, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(LAYERS, STEPS, heads, HEAD_DIM)) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    return Trace.from_qkv(2 * q, k, v, **FORMS[form])


def attention_of(trace, index):
    """In NumPy, ``[q_heads, steps, keys]``."""
    meta, (q, k, _) = trace.meta, (x.astype(np.float64) for x in trace.layer(index))
    distance = np.arange(meta.steps)[:, None] - np.arange(meta.steps)
    logits = meta.scale * np.einsum("qhd,khd->hqk", q, k.repeat(meta.group, axis=1))
    logits = logits if meta.softcap is None else meta.softcap * np.tanh(logits / meta.softcap)
    logits = logits - np.reshape(meta.slopes or np.zeros(meta.q_heads), (-1, 1, 1)) * distance
    window = (meta.windows or [None] * meta.layers)[index] or meta.steps
    weights = np.where((distance >= 0) & (distance < window), np.exp(logits), 0)
    return weights / weights.sum(-1, keepdims=True)


CASES = [(form, SPECS[0], chunk) for form in FORMS for chunk in (1, 4)] + [("all", spec, 1) for spec in SPECS[1:]]
CASES += [pytest.param(form, spec, 4, marks=pytest.mark.slow) for form in FORMS for spec in SPECS[1:]]


@pytest.mark.parametrize(("form", "spec", "chunk"), CASES)
def test_replay_cache_and_specification_agree(form, spec, chunk, tmp_path):
    policy, options = parse(spec), {"chunk": chunk, "prompt": 20 if "kv" in spec else None}
    made(form).save(tmp_path / "trace")
    trace = Trace.open(tmp_path / "trace")
    assert [finding for finding in verify(trace, policy, **options) if not finding.held] == []
    found = replay(trace, policy, **options)
    assert (found.live[..., -1] < STEPS).any()
    for layer in trace.meta.local:
        assert (
            found.live[layer] == np.minimum(np.arange(1, STEPS + 1), trace.meta.windows[layer] - 1)
        ).all() or chunk > 1
        np.testing.assert_allclose(found.mass[layer], 1, atol=1e-6)
        np.testing.assert_allclose(found.error[layer], 0, atol=1e-5)
    wide = [layer for layer in range(LAYERS) if layer not in trace.meta.local]
    alone = replay(trace.part(layers=wide), policy, **options)
    np.testing.assert_array_equal(found.until[wide], alone.until)


@pytest.mark.parametrize("form", FORMS)
def test_mass_and_error_are_those_of_the_form(form):
    trace = made(form)
    found, bounds = replay(trace, Corm(window=4, recent=2), keep_history=True), []
    for index in range(LAYERS):
        alpha = attention_of(trace, index)
        seen = np.arange(1, STEPS + 1)[:, None] <= found.until[index][:, None]
        rest = np.where(seen.repeat(GROUP, 0), alpha, 0)
        np.testing.assert_allclose(found.mass[index], rest.sum(-1), atol=1e-5)
        v = trace.layer(index).v.repeat(GROUP, axis=1)
        full, kept = (np.einsum("hqk,khd->hqd", x, v) for x in (alpha, rest / rest.sum(-1, keepdims=True)))
        error = np.linalg.norm(kept - full, axis=-1) / np.linalg.norm(full, axis=-1)
        np.testing.assert_allclose(found.error[index], error, atol=1e-4)
        bounds.append(alpha.reshape(KV_HEADS, GROUP, STEPS, STEPS).mean(1))
        np.testing.assert_allclose([*oracle.attention(trace, index)], bounds[-1], atol=1e-5)
    np.testing.assert_allclose(
        oracle.bounds(trace, found).most[0, 0],
        oracle.most(bounds[0][0].astype(np.float32), found.attended[0, 0]),
        atol=1e-5,
    )


def test_a_trace_of_rows_is_replayed_alike():
    trace = made("all")
    windows = trace.meta.windows
    rows = Trace.from_attention(
        [attention_of(trace, index) for index in range(LAYERS)], kv_heads=KV_HEADS, windows=windows
    )
    for policy in (Corm(window=6, recent=2), parse("h2o:recent=2,budget=9")):
        one, other = (replay(each, policy, errors=False) for each in (trace, rows))
        np.testing.assert_array_equal(one.until, other.until)
        np.testing.assert_allclose(one.mass, other.mass, atol=1e-5)


def test_a_sweep_leaves_local_layers_alone():
    trace = made("local")
    grid = sweep(trace, Corm, {"window": [3, 9], "recent": [2]})
    for place, window in enumerate((3, 9)):
        np.testing.assert_array_equal(grid.until[place, 0], replay(trace, Corm(window=window, recent=2)).until)


def test_a_capacity_is_that_of_global_layers():
    trace = made("local")
    found = replay(trace, Corm(window=9, recent=2), capacity=5)
    assert not found.overflow[list(trace.meta.local)].any()
    assert found.overflow[1].all()
    assert [finding for finding in verify(trace, Corm(window=9, recent=2), capacity=5) if not finding.held] == []
