"""Teacher-forced reading, where the prompt ends."""

import numpy as np
import pytest

from corm_jax import Full, SnapKV
from corm_jax.runs.perplexity import read_text
from tests.models import tiny

TOKENS = np.random.default_rng(0).integers(0, 97, 100).tolist()


@pytest.mark.parametrize("chunk", [7, 16, 100])
def test_the_prompt_ends_a_chunk(chunk):
    """The tokens after the prompt are read after the eviction, for any chunk; later nothing is evicted."""
    policy, model = SnapKV(budget=12, window=4), tiny()
    reading, single = (read_text(model, policy, TOKENS, chunk=each, prompt=60) for each in (chunk, 1))
    ends = [*range(chunk, 60, chunk), 60, *range(60 + chunk, 100, chunk), 100]
    assert reading.seen.tolist() == ends
    for live, n in zip(reading.live.transpose(1, 0, 2), ends, strict=True):
        assert (live == (n if n < 60 else 12 + n - 60)).all()
    np.testing.assert_allclose(reading.nll, single.nll, atol=2e-4)
    full = read_text(model, Full(), TOKENS, chunk=chunk, prompt=60).nll
    np.testing.assert_allclose(reading.nll[:60], full[:60], atol=2e-4)  # the 61st token is predicted before it goes
    assert np.abs(reading.nll[60] - full[60]) > 1e-3
