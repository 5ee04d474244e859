"""Proof on a trace, and that it can fail."""

from dataclasses import replace

import numpy as np
import pytest

from corm_jax import TOVA, AdaptiveCorm, Corm, CormError, budget, parse, policy
from corm_jax.traces.arrays import TraceError
from corm_jax.traces.trace import Trace
from simulator import synthetic
from simulator.replay import replay
from simulator.synthetic import noise
from simulator.verify import STAGES, verify
from tests.heads import corm_last

TRACE = synthetic.topics(layers=2, steps=70, kv_heads=2, group=2, length=10)


def held(findings):
    return {finding.name: finding.held for finding in findings}


@pytest.mark.parametrize(
    "how", [{}, {"chunk": 7}, {"capacity": 20}, {"chunk": 7, "capacity": 20}, {"chunk": 2**31 - 1}]
)
def test_corm_holds(how):
    findings = held(verify(TRACE, Corm(window=12, recent=4), **how))
    assert {"specification", "cache", "none_returns", "newest_live"} < findings.keys()
    assert all(findings.values())


def test_progress_goes_up_to_the_stages_of_every_layer():
    calls = []
    verify(TRACE, Corm(window=12, recent=4), progress=calls.append)
    assert calls == list(range(1, STAGES * 2 + 1))


def test_others_hold():
    findings = held(verify(TRACE, budget(TOVA(), 16), chunk=3, capacity=24))
    assert findings == {"specification": True, "cache": True, "none_returns": True, "within_capacity": True}


@pytest.mark.parametrize("wrong", [{"window": 13}, {"recent": 12}, {"group": "mean"}, {"threshold": "live"}])
def test_another_specification_does_not(wrong):
    def reference(*arrays, **fields):
        return corm_last(*arrays, **(fields | wrong))

    finding = verify(TRACE, Corm(window=12, recent=4), reference=reference)[0]
    assert (finding.name, finding.held) == ("specification", False)
    assert "other keys than in NumPy" in finding.detail


def test_a_policy_of_ones_own_needs_no_specification():
    @policy
    class Mine(Corm):
        pass

    findings = held(verify(TRACE, Mine(window=12, recent=4)))
    assert findings == {"cache": True, "none_returns": True}
    assert held(verify(TRACE, Mine(window=12, recent=4), reference=corm_last))["specification"]


def test_what_cannot_work_is_said():
    rows = Trace.from_attention(np.tril(np.ones((1, 2, 4, 4))) / np.arange(1, 5)[:, None])
    with pytest.raises(TraceError, match="holds no queries and keys"):
        verify(rows, Corm(window=2, recent=1))
    with pytest.raises(CormError, match="is not a policy"):
        verify(TRACE, [Corm()] * 2)


@pytest.mark.parametrize("spec", ["corm", "corm:group=mean,sinks=1"])
def test_one_number_for_each_layer_and_head(spec):
    """Two layers of two heads with four windows: as specified, as layers by themselves, and in the cache."""
    window, recent, multiple = np.array([[3, 40], [9, 1]]), np.array([[2, 1], [1, 5]]), np.array([[1, 2], [3, 1]])
    trace = noise(layers=2, steps=30, kv_heads=2)

    def made(window, recent, multiple):
        policy = parse(spec)
        if isinstance(policy, Corm):
            return replace(policy, window=window, recent=recent, multiple=multiple)
        return replace(policy, policy=replace(policy.policy, window=window, recent=recent, multiple=multiple))

    whole = made(window, recent, multiple)
    assert all(finding.held for finding in verify(trace, whole))
    kept = replay(trace, whole).history()
    for layer in range(2):
        alone = replay(trace, [made(window[layer], recent[layer], multiple[layer])] * 2).history()
        np.testing.assert_array_equal(kept[layer], alone[layer])
    assert len({int(kept[layer, head, -1].sum()) for layer in range(2) for head in range(2)}) > 2
    adaptive = AdaptiveCorm(window=window, recent=recent, multiple=multiple, patience=window.T, trial=recent.T)
    assert all(finding.held for finding in verify(trace, adaptive))
    with pytest.raises(CormError, match="of the 2 key-value heads, or for each of them in 3 layers"):
        replay(noise(layers=3, steps=30, kv_heads=2), whole)
