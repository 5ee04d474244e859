"""Each pattern draws what its name says, and the same arguments draw the same."""

import numpy as np
import pytest

from corm_jax import CormError
from simulator import oracle, synthetic

CALM = {"layers": 1, "steps": 256, "noise": 0.5}


def attention(pattern, **arguments):
    return next(oracle.attention(pattern(**CALM, **arguments), 0))


@pytest.mark.parametrize("pattern", synthetic.PATTERNS)
def test_seeded(pattern):
    make = synthetic.PATTERNS[pattern]
    one, same, other = (make(layers=1, steps=40, seed=seed).layer(0) for seed in (3, 3, 4))
    for x, y in zip(one, same, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(one.k, other.k)
    make(layers=1, steps=1)  # the smallest


def test_sinks():
    assert attention(synthetic.sinks)[100:, :4].sum(-1).min() > 0.6


def test_local():
    alpha = attention(synthetic.local, window=16.0)
    near = np.abs(np.arange(256)[:, None] - np.arange(256)) < 20
    assert (alpha * near)[100:].sum(-1).mean() > 0.7


def test_heavy_hitters():
    alpha = attention(synthetic.heavy_hitters, share=0.05)
    columns = np.sort(alpha[128:, :128].sum(0))[::-1]
    assert columns[:10].sum() > 0.7 * columns.sum()


def test_periodic():
    alpha = attention(synthetic.periodic, period=32.0)[200]
    visits = alpha[200 - 32 * np.arange(6)]
    assert visits.min() > 5 * alpha[200 - 16 - 32 * np.arange(5)].max()


def test_topics():
    alpha = attention(synthetic.topics, count=4, length=16)
    for t in (100, 200, 255):
        heavy = alpha[t] > 0.5 * alpha[t].max()
        assert 0 < heavy.sum() < 0.6 * t  # one topic's keys, not all


def test_needles():
    alpha = attention(synthetic.needles, count=4)
    key, query = np.argwhere(alpha[192:, :128] > 0.9).T[::-1]
    assert len(set(key)) == len(set(query)) == 4
    asked = np.delete(alpha, query + 192, axis=0)[128:, key]
    assert asked.max() < 0.2  # by nobody else


def test_what_cannot_work_is_said():
    with pytest.raises(CormError, match="steps must be at least 1, not 0"):
        synthetic.noise(steps=0)
