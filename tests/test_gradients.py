"""Gradients through a cache: those of attention over the keys that each query saw, whoever evicts, in any layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import CacheSpec, Corm, Full, Rotary, begin_prompt, make_cache, parse
from corm_jax.core import attention
from corm_jax.core.arrays import ENDLESS
from corm_jax.core.positions import Rope
from corm_jax.core.step import read
from corm_jax.model.decoder import forward, make_caches
from tests.drive import CHUNK, KV_HEADS, TOKENS, in_numpy, normal
from tests.heads import chunks_of
from tests.models import tiny

SPECS = [
    "full",
    "corm:window=4,recent=2,multiple=2",
    "adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=4",
    "streaming_llm:sinks=2,budget=6",
    "window:size=6",
    "h2o:recent=2,attention=mean,budget=6",
    "scissorhands:budget=6,window=5,recent=2",
    "tova:budget=6",
    "l2norm:budget=6",
    "random:budget=6",
    "snapkv:budget=6,window=3,kernel=3",
    "adakv:budget=6,window=2,kernel=3",
    "h2o:recent=2,budget=6,sinks=1,oneshot=true",
]
CHUNKS = TOKENS // 2
CASES = [(spec, CHUNKS, None) for spec in SPECS]  # `full` and its kin block by block
CASES += [(spec, 1, None) for spec in SPECS[:2]]
CASES += [(SPECS[0], 1, 1), (SPECS[1], CHUNKS, 1)]  # in a pool, and the others
CASES += [pytest.param(spec, 1, 1, marks=pytest.mark.slow) for spec in SPECS[2::2]]
CASES += [pytest.param(spec, CHUNKS, 1, marks=pytest.mark.slow) for spec in SPECS[3::2]]
WEIGHTS = np.random.default_rng(5).normal(size=(TOKENS, KV_HEADS, 2, 4)).astype(np.float32)


def through_the_cache(policy, q, k, v, chunk, stores):
    cache = begin_prompt(make_cache(policy, CacheSpec(KV_HEADS, TOKENS, 4, stores=stores)), 12)
    outputs, *_ = read(policy, cache, q, k, v, jnp.int32(TOKENS), chunk=chunk)
    return (outputs * WEIGHTS).sum()


def dense(q, k, v, seen):
    """Attention over the keys that each query saw: ``seen [tokens, kv_heads, keys]``. In float64."""
    logits = jnp.einsum("thgd,ihd->thgi", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -jnp.inf))
    return (jnp.einsum("thgi,ihd->thgd", weights, v) * WEIGHTS.astype(np.float64)).sum()


def seen_by(readings, counts):
    """What each query saw, by the specification: what stayed after the chunk before its own, and causally its own."""
    seen, start = np.zeros((TOKENS, KV_HEADS, TOKENS), bool), 0
    for step, count in enumerate(counts):
        for head, reading in enumerate(readings):
            for token in range(start, start + count):
                before = reading.kept[step - 1] if step else set()
                seen[token, head, [*before, *range(start, token + 1)]] = True
        start += count
    return seen


@pytest.mark.parametrize(("spec", "chunk", "stores"), CASES)
def test_gradients_are_those_of_what_was_seen(spec, chunk, stores, monkeypatch):
    monkeypatch.setattr(attention, "KEYS_PER_BLOCK", 8)  # so that those who do not look at attention go block by block
    policy, columns, counts = parse(spec), normal(2), chunks_of(TOKENS, chunk)
    readings = in_numpy(policy, *columns, counts, prompts={0: 12})
    assert min(reading.margin for reading in readings) > 1e-4
    run = jax.jit(jax.grad(partial(through_the_cache, chunk=chunk, stores=stores), argnums=(1, 2, 3)))
    found = run(policy, *columns)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [jnp.asarray(x, jnp.float64) for x in columns]
        expected = jax.grad(dense, argnums=(0, 1, 2))(*wide, jnp.asarray(seen_by(readings, counts)))
    for name, one, other in zip("qkv", found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)
        assert np.abs(other).max() > 0.1


def test_forwards_as_well_and_twice(monkeypatch):
    """Block by block: a derivative along a direction is the gradient times it, and there are second derivatives."""
    monkeypatch.setattr(attention, "KEYS_PER_BLOCK", 8)
    columns = normal(3)
    direction = tuple(np.ones_like(x) for x in columns)
    loss = partial(through_the_cache, Full(), chunk=CHUNKS, stores=None)
    value, slope = jax.jit(lambda *x: jax.jvp(loss, x, direction))(*columns)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*columns)
    np.testing.assert_allclose(value, jax.jit(loss)(*columns), rtol=1e-5)
    np.testing.assert_allclose(slope, sum(float(one.sum()) for one in gradients), rtol=1e-4)
    along = jax.jit(lambda *x: jax.jvp(jax.grad(loss), x, direction)[1])(*columns)
    higher, lower = (jax.jit(jax.grad(loss))(*(x + sign * 1e-2 for x in columns)) for sign in (1, -1))
    np.testing.assert_allclose(along, (higher - lower) / 2e-2, atol=2e-2)


def test_positions_in_the_cache(monkeypatch):
    """Where keys are rotated by their place: finite differences."""
    policy = parse("streaming_llm:sinks=2,budget=6,positions=cache")
    columns, encoding = normal(4), Rotary(Rope().frequencies(4))
    cache = make_cache(policy, CacheSpec(KV_HEADS, TOKENS, 4))

    @jax.jit
    def loss(*columns):
        outputs, *_ = read(policy, cache, *columns, jnp.int32(TOKENS), encoding, chunk=CHUNK - 1)
        return (outputs * WEIGHTS).sum()

    for at in range(3):
        direction = [np.zeros_like(x) for x in columns]
        direction[at] = np.random.default_rng(at).normal(size=columns[at].shape).astype(np.float32)
        higher, lower = (
            loss(*(x + sign * 1e-2 * d for x, d in zip(columns, direction, strict=True))) for sign in (1, -1)
        )
        gradient = jax.jit(jax.grad(loss, argnums=at))(*columns)
        np.testing.assert_allclose((gradient * direction[at]).sum(), (higher - lower) / 2e-2, rtol=2e-2)


@pytest.mark.parametrize("stores", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_through_a_model(stores, monkeypatch):
    """The gradients of all weights, where nothing is evicted: by blocks, by pages, and token by token the same."""
    monkeypatch.setattr(attention, "KEYS_PER_BLOCK", 8)
    model, tokens = tiny(), jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 20)), jnp.int32)

    def loss(model, policy, chunk):
        caches = make_caches(model, policy, batch=2, capacity=20, stores=stores)
        x, _, _ = forward(model, policy, caches, tokens[:, :-1], jnp.full(2, 19, jnp.int32), chunk=chunk)
        scores = jax.nn.log_softmax(model.logits(x))
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    run = jax.jit(jax.value_and_grad(loss), static_argnames="chunk")
    value, gradients = run(model, Full(), chunk=19)
    for policy, chunk in ((Corm(window=ENDLESS, recent=1), 1), (parse("tova:budget=40"), 19)):
        other, theirs = run(model, policy, chunk=chunk)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-4)
            assert np.abs(one).max() > 1e-4
