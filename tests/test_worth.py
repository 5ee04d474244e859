"""The worth of outputs: both ends of the way against the cache, gradients against differences, scores against KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import CormError, Full, parse
from corm_jax.runs import perplexity, worth
from tests.models import tiny

MODEL = tiny()
IDS = np.random.default_rng(0).integers(0, 97, 200).tolist()


@pytest.fixture(autouse=True, scope="module")
def _blocks():
    before, worth.QUERIES_PER_BLOCK = worth.QUERIES_PER_BLOCK, 64
    yield
    worth.QUERIES_PER_BLOCK = before


def test_the_ends_are_a_window_and_everything():
    window = parse(f"streaming_llm:sinks={worth.SINKS},budget={worth.SINKS + worth.WINDOW - 1}")  # and the query's own
    for g, policy in ((1, Full()), (0, window)):
        loss, _ = worth.gradient(MODEL, IDS, 150, g)
        assert loss == pytest.approx(perplexity.read_text(MODEL, policy, IDS).nll[149:].mean(), abs=1e-5)


def through(changes, g):
    """What leaves the last layer when the heads' outputs are changed."""
    x = MODEL.embed(jnp.asarray([IDS]), jnp.arange(len(IDS), dtype=jnp.int32)[None])
    for layer, change in zip(MODEL.layers, changes, strict=True):
        x = worth.mixed(layer, x, jnp.asarray(change, jnp.float32), jnp.float32(g))
    return MODEL.logits(x)[0]


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_are_what_small_changes_cost(index):
    _, found = worth.gradient(MODEL, IDS, 150, 0.5)
    direction = np.random.default_rng(1).normal(size=found[index].shape).astype(np.float32)
    direction /= np.linalg.norm(direction)

    def moved(step):
        logits = through([step * direction * (place == index) for place in range(2)], 0.5)
        return nll(logits[149:-1], IDS[150:]).mean()

    difference = float(moved(0.3) - moved(-0.3)) / 0.6
    assert difference == pytest.approx((found[index] * direction).sum(), rel=2e-2, abs=1e-5)


def nll(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[:, None], axis=1)[:, 0]


def test_scores_tell_how_far_small_changes_move_the_prediction():
    drawn = [worth.scores(MODEL, IDS, seed)[0] for seed in range(40)]
    rng, expected, found = np.random.default_rng(2), 0.0, 0.0
    before = jax.nn.log_softmax(through([0 * drawn[0]] * 2, 1.0))
    for _ in range(20):
        change = rng.normal(size=drawn[0].shape) * 1e-2
        after = jax.nn.log_softmax(through([change, 0 * change], 1.0))
        expected += float((jnp.exp(before) * (before - after)).sum())
        found += np.mean([(score * change).sum() ** 2 for score in drawn]) / 2
    assert found == pytest.approx(expected, rel=0.15)  # 800 squares: 5%


def test_local_layers_read_their_windows():
    model = tiny(layers=2, windows=(9, None))
    newest = parse(f"streaming_llm:sinks={worth.SINKS},budget={worth.SINKS + worth.WINDOW - 1}")
    for g, policy in ((1, Full()), (0, newest)):
        loss, gradients = worth.gradient(model, IDS, 150, g)
        assert loss == pytest.approx(perplexity.read_text(model, policy, IDS).nll[149:].mean(), abs=1e-5)
    assert [one.shape for one in gradients] == [(200, 2, 2, 8)] * 2
    wrong = tiny(layers=2, windows=(None, 9))
    with pytest.raises(CormError, match="a layer attends with a window: only softmax"):
        worth.mixed(wrong.layers[1], jnp.zeros((1, 4, 32)), jnp.zeros((4, 2, 2, 8)), jnp.float32(1))
