"""StreamingLLM's positions: in the text, or in the cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import CacheSpec, CormError, Full, Rotary, make_cache, parse, prefill, step
from corm_jax.core.options import policy as policy_class
from corm_jax.core.positions import Rope
from corm_jax.core.step import read
from corm_jax.core.wrapper import Wrapper
from corm_jax.model.decoder import make_caches
from simulator.reading import Form, read_layer
from simulator.replay import replay
from simulator.specification import rule_of
from simulator.synthetic import noise
from tests.models import tiny

FREQUENCIES = Rope().frequencies(8)
SPEC = "streaming_llm:sinks=2,budget=7,positions=cache"


@policy_class
class InCache(Wrapper):
    """The policy inside, with positions in the cache: keys leave from everywhere, and several at once."""

    @property
    def traits(self):
        return super().traits._replace(positions="cache")


@pytest.mark.parametrize("stores", [None, 1])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("spec", [SPEC, f"{SPEC},recent=3,oneshot=false", "corm:window=5,recent=1"])
def test_positions_in_the_cache_are_those_of_the_specification(spec, chunk, stores):
    rng, policy = np.random.default_rng(chunk), parse(spec)
    policy = policy if "positions" in spec else InCache(policy=policy)
    q, k, v = (3 * rng.normal(size=shape).astype(np.float32) for shape in ((24, 2, 3, 8), (24, 2, 8), (24, 2, 8)))
    capacity = (7 if "positions" in spec else 20) + chunk
    cache = make_cache(policy, CacheSpec(kv_heads=2, capacity=capacity, head_dim=8, stores=stores))
    output, cache, *_ = jax.jit(partial(read, policy, chunk=chunk))(cache, q, k, v, 24, Rotary(FREQUENCIES))
    rules_ = [rule_of(parse(spec), head) for head in range(2)]
    form = Form(frequencies=FREQUENCIES, in_cache=True)
    expected = read_layer(rules_, q, k, v, chunks=[chunk] * (24 // chunk), form=form)
    assert not cache.overflow.any()
    head_of, position = np.asarray(cache.layout.heads(*cache.position.shape)), np.asarray(cache.position)
    for head, reading in enumerate(expected):
        np.testing.assert_allclose(output[:, head], reading.outputs, atol=2e-5)
        assert set(position[head_of == head]) - {-1} == reading.kept[-1]


def test_a_layer_sees_the_sinks_and_the_newest_as_a_text_of_their_own():
    """With one layer, keys do not depend on what went before: the prediction is that for the shortened text."""
    model, policy = tiny(layers=1), parse(SPEC)
    prompt = np.random.default_rng(0).integers(0, 97, 40).tolist()

    def predict(policy, tokens):
        return prefill(model, policy, make_caches(model, policy, batch=1, capacity=40), [tokens])[0]

    # The last query attends to the seven that stayed before it came, and to itself.
    shortened = predict(Full(), prompt[:2] + prompt[-6:])
    np.testing.assert_allclose(predict(policy, prompt), shortened, atol=2e-5)
    np.testing.assert_allclose(predict(policy, prompt[:7]), predict(Full(), prompt[:7]), atol=2e-5)
    original = predict(parse("streaming_llm:sinks=2,budget=7"), prompt)
    assert np.abs(original - shortened).max() > 1e-3


def test_who_cannot_rotate_says_so():
    policy, x = parse(SPEC), jnp.ones((1, 1, 8))
    cache = make_cache(policy, CacheSpec(kv_heads=1, capacity=9, head_dim=8))
    with pytest.raises(CormError, match="counts positions within the cache: give an encoding such as Rotary"):
        step(policy, cache, x[:, :, None], x, x, jnp.int32(1))
    text = make_cache(parse("streaming_llm:sinks=2,budget=7"), CacheSpec(kv_heads=1, capacity=9, head_dim=8))
    with pytest.raises(CormError, match="positions within the text, and .* counts them within the cache: make"):
        step(policy, text, x[:, :, None], x, x, jnp.int32(1), Rotary(FREQUENCIES))
    with pytest.raises(CormError, match="positions within the cache, and .* counts them within the text: make"):
        step(parse("streaming_llm:sinks=2,budget=7"), cache, x[:, :, None], x, x, jnp.int32(1))
    with pytest.raises(CormError, match="a trace holds keys that are rotated already: replay .* positions='original'"):
        replay(noise(steps=20), policy)
