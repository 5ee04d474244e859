"""What a layer with a sliding window can see, and no more, is kept; the other layers have the policy asked for."""

from functools import partial

import jax
import numpy as np
import pytest

from corm_jax import CacheSpec, Corm, CormError, Full, PyramidKV, Window, make_cache, of_layers, per_layer, read
from tests.drive import HEAD_DIM, KV_HEADS, TOKENS, normal

SIZE = 5


@pytest.mark.parametrize(("chunk", "capacity", "stores"), [(1, SIZE, None), (1, SIZE, 1), (4, SIZE + 3, None)])
def test_outputs_are_those_of_the_full_cache(chunk, capacity, stores):
    """Token by token, as many slots as the window is wide are enough."""

    @partial(jax.jit, static_argnames=("capacity", "stores"))
    def run(policy, *columns, capacity, stores):
        cache = make_cache(policy, CacheSpec(KV_HEADS, capacity, HEAD_DIM, stores=stores))
        return read(policy, cache, *columns, TOKENS, chunk=chunk, window=SIZE)

    columns = normal(chunk)
    outputs, cache, live, passes = run(Window(size=SIZE), *columns, capacity=capacity, stores=stores)
    expected, *_ = run(Full(), *columns, capacity=TOKENS, stores=stores)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    clock = np.arange(chunk, TOKENS + 1, chunk)[:, None]
    assert (np.asarray(live) == np.minimum(clock, SIZE - 1)).all()
    assert not cache.overflow.any()
    assert (passes == 1).all()


def test_fewer_slots_than_the_window_are_refused():
    with pytest.raises(CormError, match="capacity 4 "):
        make_cache(Window(size=5), CacheSpec(KV_HEADS, 4, HEAD_DIM))


def test_local_layers_hold_their_window_and_the_others_what_is_asked_for():
    """A pyramid counts the global layers alone: the budgets of a model of two."""
    windows = (7, None, 7, 9, None)
    pyramid, two = PyramidKV(budget=20, window=4), per_layer(PyramidKV(budget=20, window=4), 2)
    assert of_layers(pyramid, 5, windows) == (Window(size=7), two[0], Window(size=7), Window(size=9), two[1])
    rows = Corm(window=np.arange(1, 11).reshape(5, 2))
    assert [of_layers(rows, 5, windows)[layer].window.tolist() for layer in (1, 4)] == [[3, 4], [9, 10]]
    each = [Full(), Corm(window=3), Full(), Full(), Corm(window=4)]
    assert [type(one) for one in of_layers(each, 5, windows)] == [Window, Corm, Window, Window, Corm]
    assert of_layers(pyramid, 2) == two == of_layers(pyramid, 2, (None, None))
    for wrong in (each[:4], rows):
        with pytest.raises(CormError, match="for (5|6) layers"):
            of_layers(wrong, 5 if wrong is not rows else 6, windows if wrong is not rows else (*windows, 3))
    with pytest.raises(CormError, match="5 windows for 4 layers: give one for each, None where there is none"):
        of_layers(pyramid, 4, windows)
