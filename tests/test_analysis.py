"""What `analyse` measures, counted once more in loops."""

import numpy as np
import pytest

from corm_jax import Corm, CormError
from corm_jax.evaluation import analysis
from corm_jax.runs.forms import Written
from corm_jax.runs.recording import record
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from tests.models import tiny

MODEL = tiny()
IDS = np.random.default_rng(0).integers(0, 97, 300).tolist()


@pytest.fixture(scope="module")
def found():
    return analysis.analyse(MODEL, IDS)


@pytest.fixture(scope="module")
def recorded():
    return list(record(MODEL, IDS))


@pytest.mark.parametrize("form", [{}, {"rope": None, "alibi": True, "attention_softcap": 2.0}], ids=["plain", "alibi"])
def test_in_loops(form):
    model = tiny(**form)
    found, recorded = analysis.analyse(model, IDS), list(record(model, IDS))
    slopes = np.zeros(4) if not form else 2.0 ** -(2 * np.arange(1, 5))
    q, k = recorded[1].q, recorded[1].k
    length, window, (below, covered, important) = len(q), 64, (0.0, 0, 0)
    last = {}
    for t in range(1, length + 1):
        asks = set()
        for head in range(4):
            logits = (k[:t, head // 2] @ q[t - 1, head]) * q.shape[-1] ** -0.5
            if form:
                logits = 2 * np.tanh(logits / 2)
            logits = logits - slopes[head] * (t - 1 - np.arange(t))
            alpha = np.exp(logits - logits.max())
            alpha /= alpha.sum()
            asks |= {(head // 2, i) for i in range(t) if alpha[i] >= 1 / t}
            if t > analysis.FIRST and head == 3:
                below += (alpha < 1 / t).mean()
        if t > analysis.FIRST:
            important += len(asks)
            covered += sum(last.get(key, -(10**6)) >= t - window or key[1] + 1 > t - window for key in asks)
        last |= dict.fromkeys(asks, t)
    assert found["sparsity"][1][3] == pytest.approx(below / (length - analysis.FIRST), abs=1e-3)
    assert found["coverage"][1][0] == pytest.approx(covered / important, abs=1e-3)


def test_keeps_what_a_replay_of_recorded_attention_keeps(found, recorded):
    q, k, v = (np.stack([getattr(one, name) for one in recorded]) for name in ("q", "k", "v"))
    trace = Trace.from_qkv(q, k, v)
    for w, window in enumerate(found["windows"][:2]):
        kept = replay(trace, Corm(window=window, recent=32), fidelity="recorded").history()[:, :, -1]
        np.testing.assert_allclose(np.array(found["kept"])[:, w, 1], kept.mean((1, 2)), atol=2e-3)


def test_queries(found, recorded):
    q = recorded[0].q
    unit = q / np.linalg.norm(q, axis=-1, keepdims=True)
    expected = np.mean([unit[t, h] @ unit[t - 4, h] for t in range(4, 300) for h in range(4)])
    assert found["similarity"][0][found["distances"].index(4)] == pytest.approx(expected, abs=1e-5)
    errors = np.array(found["lsh_error"])
    assert (errors[:, 0] > errors[:, -1]).all()  # more signs, less error
    assert errors[:, -1].max() < 0.1


def test_too_short():
    with pytest.raises(CormError, match="is too short: give at least 128"):
        analysis.analyse(MODEL, IDS[:20])


def test_local_layers_are_left_out():
    model = tiny(layers=3, windows=(16, None, 16))
    found, recorded = analysis.analyse(model, IDS), list(record(model, IDS))
    assert found["layers"] == [1]
    plain = Written(None, None, (None,))
    sparsity, coverage, kept = analysis._importance(recorded[1].q, recorded[1].k, plain)
    np.testing.assert_allclose(found["sparsity"], [sparsity])
    np.testing.assert_allclose(found["coverage"], [coverage])
    np.testing.assert_allclose(found["kept"], [kept])
    with pytest.raises(CormError, match="all layers of this model are local"):
        analysis.analyse(tiny(windows=(16, 16)), IDS)
