"""The worked example of the README: nine tokens, w = 4, r = 2."""

import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import Corm
from simulator import reference
from simulator.verify import drive
from tests.heads import corm_last, live_sets

WORDS = ["The", "cat", "sat", "on", "the", "mat", "because", "it", "purred"]
ASKED = [{0}, {0, 1}, {1, 2}, {0, 2, 3}, {3}, {0, 3, 5}, {0, 6}, {0, 1, 7}, {7, 8}]
"""Which tokens each query looks at, equally and at nothing else: its row of the message matrix."""

KEPT = [
    "The",
    "The cat",
    "The cat sat",
    "The cat sat on",
    "The cat sat on the",  # nobody asked for the second "the", but it is among the newest two
    "The cat sat on the mat",
    "The sat on mat because",  # "the" was never asked for; "cat" not by queries 4 to 7
    "The on mat because it",  # "sat" not by queries 5 to 8. "it" asks for "cat": too late
    "The on mat because it purred",
]


def head():
    keys = 30.0 * np.eye(9, dtype=np.float32)
    queries = np.stack([keys[sorted(asked)].sum(0) for asked in ASKED])[:, None]
    return queries, keys, np.eye(9, dtype=np.float32)


def words(kept):
    return " ".join(WORDS[i] for i in sorted(kept))


@pytest.mark.parametrize("rule", [reference.corm_messages, corm_last])
def test_in_the_specification(rule):
    reading = rule(*head(), window=4, recent=2)
    assert [words(kept) for kept in reading.kept] == KEPT
    # Query 8 wanted The, cat and it; without cat it divides its attention between the other two.
    np.testing.assert_allclose(reading.outputs[7, 0], [0.5, 0, 0, 0, 0, 0, 0, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("capacity", [9, 7])
def test_in_jax(capacity):
    q, k, v = (jnp.asarray(x)[:, None] for x in head())
    outputs, position, last = drive(Corm(window=4, recent=2), q, k, v, 9, capacity=capacity, chunk=1)
    assert [words(live_sets(p[0])) for p in position] == KEPT
    assert int(last.overflow[0]) == 0
    np.testing.assert_allclose(outputs[7, 0, 0], [0.5, 0, 0, 0, 0, 0, 0, 0.5, 0], atol=1e-6)
