"""Rotary frequencies, by hand."""

import numpy as np

from corm_jax.core.positions import Rope

PLAIN = 10000.0 ** -(np.arange(4) / 4)


def test_kinds_of_scaling():
    assert Rope()[:7] == (10000.0, "default", 1.0, 1.0, 4.0, 8192, ())
    for rope, expected in (
        (Rope(), PLAIN),
        (Rope(theta=16.0), [1, 0.5, 0.25, 0.125]),
        (Rope(kind="linear", factor=4.0), PLAIN / 4),
        (Rope(kind="divisors", divisors=(1.0, 2.0, 4.0, 8.0)), PLAIN / [1, 2, 4, 8]),
    ):
        np.testing.assert_allclose(rope.frequencies(8), expected, rtol=1e-6)
        assert rope.frequencies(8).dtype == np.float32


def test_long_wavelengths_are_stretched_and_short_ones_are_not():
    """Llama 3.1's rule at theta = 16 and a context of 16 pi: 8, 4, 2 and 1 turns, of which 8 are high and 2 are low."""
    rope = Rope(16.0, "llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=8.0, original_context=16 * np.pi)
    blended = (1 - 1 / 3) * 0.5 / 8 + 1 / 3 * 0.5
    np.testing.assert_allclose(rope.frequencies(8), [1, blended, 0.25 / 8, 0.125 / 8], rtol=1e-6)
