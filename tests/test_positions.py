"""Positions: rotary frequencies by hand and against transformers, and what attention makes of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax.core.positions import ALiBi, Hybrid, Rope

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


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}


@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
        YARN | {"beta_fast": 2.0, "beta_slow": 2.0},
        YARN | {"truncate": False, "factor": 16.0},
        YARN | {"attention_factor": 1.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
        YARN | {"mscale": 0.7},
        YARN | {"factor": 0.5, "rope_theta": 50.0},
        LONG,
        LONG | {"factor": 4.0},
        LONG | {"attention_factor": 1.25},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_scalings_against_transformers(scaling):
    """The frequencies, and by what rotated queries and keys are multiplied; for LongRoPE those of either length."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from corm_jax.model.families.llama import Llama

    size = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 512}
    rope = Llama.model_validate({"model_type": "llama", **size, "rope_parameters": scaling}).rope
    config, kind = LlamaConfig(**size, rope_parameters=dict(scaling)), scaling["rope_type"]
    for one, length in ((rope, 32), (rope.beyond(), 512)) if kind == "longrope" else ((rope, 32),):
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        np.testing.assert_allclose(one.frequencies(8), frequencies.numpy(), rtol=1e-6)
        assert one.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize("kind", ["rotary", "part", "dynamic", "hybrid"])
def test_attention_depends_on_the_distance_alone(kind):
    """Rotated queries and keys have the products of the same distance anywhere, within the context."""
    rope = {"part": Rope(rotated=0.5), "dynamic": Rope(kind="dynamic", factor=2.0)}.get(kind, Rope())
    encoding = rope.encoding(8)
    encoding = Hybrid(encoding, ALiBi.of(1)) if kind == "hybrid" else encoding
    encoding.check(1, 1, 8)
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 8)), jnp.float32)
    products = [
        float(jnp.vdot(encoding.rotate(q, jnp.array([at + 5])), encoding.rotate(k, jnp.array([at]))))
        for at in (0, 7, 100)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)
    if kind == "part":
        np.testing.assert_array_equal(encoding.rotate(q, jnp.array([9]))[..., 4:], q[..., 4:])
