"""The worth of outputs: both ends of the way against the cache, gradients against differences."""

import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import Full, parse, perplexity
from simulator import worth
from tests.models import tiny

MODEL = tiny()
IDS = np.random.default_rng(0).integers(0, 97, 200).tolist()


def test_the_ends_are_a_window_and_everything():
    window = parse(f"streaming_llm:sinks={worth.SINKS},budget={worth.SINKS + worth.WINDOW - 1}")  # and the query's own
    for g, policy in ((1, Full()), (0, window)):
        loss, _ = worth.gradient(MODEL, IDS, 150, g)
        assert loss == pytest.approx(perplexity.read(MODEL, policy, IDS).nll[149:].mean(), abs=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_are_what_small_changes_cost(index):
    _, found = worth.gradient(MODEL, IDS, 150, 0.5)
    direction = np.random.default_rng(1).normal(size=found[index].shape).astype(np.float32)
    direction /= np.linalg.norm(direction)

    def moved(step):
        x = MODEL.embed(jnp.asarray([IDS]))
        for place, layer in enumerate(MODEL.layers):
            change = jnp.asarray(step * direction if place == index else 0 * direction)
            x = worth.mixed(layer, x, change, jnp.float32(0.5))
        return worth._loss(MODEL, x, jnp.asarray(IDS), 150)[0]

    difference = float(moved(0.3) - moved(-0.3)) / 0.6
    assert difference == pytest.approx((found[index] * direction).sum(), rel=2e-2, abs=1e-5)
