"""CORM's window, searched."""

import numpy as np
import pytest
from hypothesis import given

from corm_jax import Corm, CormError
from corm_jax.runs.fitting import TOLERANCE, WidestGap, fit_window
from corm_jax.runs.perplexity import read_text
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from simulator.verify import drive
from tests.heads import TOKENS, heads, padded
from tests.models import tiny


@given(head=heads(group=2))
def test_a_key_stays_with_every_window_above_its_widest_gap(head):
    """For w = r, with attention as recorded: one pass finds which keys each window keeps."""
    q, k, v = (padded(x, 1)[:, None] for x in head)
    n = len(head[0])
    _, _, cache = drive(WidestGap(policy=Corm()), q, k, v, n, capacity=TOKENS, chunk=1)
    gap = np.zeros(n, int)
    gap[np.asarray(cache.position[0])[cache.position[0] >= 0]] = np.asarray(cache.state[1][0])[cache.position[0] >= 0]
    trace = Trace.from_qkv(head[0][None], head[1][None, :, None], head[2][None, :, None])
    for window in range(1, n + 1):
        result = replay(trace, Corm(window=window, recent=window), fidelity="recorded", errors=False)
        np.testing.assert_array_equal(result.history()[0, 0, -1], gap < window)


def test_the_window_that_fits():
    model, tokens = tiny(), np.random.default_rng(0).integers(0, 97, 200).tolist()
    for keys in (20, 60, 150):
        window = fit_window(model, tokens, keys, Corm(group="mean"))
        live = read_text(model, Corm(window=window, recent=window, group="mean"), tokens).usage.live.mean()
        assert live == pytest.approx(keys, rel=2 * TOLERANCE)
    with pytest.raises(CormError, match="a text of 200 tokens cannot end with 201 live keys a head"):
        fit_window(model, tokens, 201, Corm())
