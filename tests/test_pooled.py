"""The pooled layout: policies in it under the conformance suite, slot by slot and page by page."""

import math
import re
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corm_jax import H2O, CacheSpec, Corm, Full, attention, cache, decode, generate, make_cache, parse, usage
from corm_jax.types import ENDLESS, Slots
from simulator.subject import Implementation
from simulator.testing import parametrize_checks
from tests.models import tiny

MODEL = tiny()

SLOTS = [
    "corm:window=4,recent=2",
    "scissorhands:budget=6,window=5,recent=2",
    "tova:budget=5",
    "adaptive_corm:window=3,recent=2,multiple=1,patience=3,trial=5",
]
PAGES = [
    "corm:window=4,recent=2,group=mean,threshold=live,sinks=1",
    "h2o:recent=2,budget=5",
    "adaptive_corm:window=2,recent=1,multiple=2,patience=2,trial=4,sinks=1",
    "adakv:budget=6,window=2,kernel=3",
]


def step_by_pages(*arguments):
    with patch.object(attention, "FEW", 0), patch.object(cache, "PAGE", 2):
        return attention.step(*arguments)


@parametrize_checks(*map(parse, SLOTS), implementation=Implementation(pooled=True), examples=4)
def test_conformance(check):
    check()


@parametrize_checks(*map(parse, PAGES), implementation=Implementation(step=step_by_pages, pooled=True), examples=4)
def test_conformance_by_pages(check):
    check()


@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 200), min_size=2, max_size=2), chunk=st.sampled_from([1, 16]))
def test_generates_as_from_rectangles(lengths, chunk):
    """Rows of different lengths, chunks that are gathered into pages, and decoding slot by slot."""
    prompts = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in lengths]
    policy, options = Corm(window=12, recent=6), {"max_new_tokens": 24, "chunk": chunk, "capacity": 240}
    one, other = (generate(MODEL, policy, prompts, **options, pooled=pooled) for pooled in (False, True))
    assert (one.caches[0].head is None, other.caches[0].head is None) == (True, False)
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(usage(one.caches).live, usage(other.caches).live)
    assert int(usage(other.caches).overflow.sum()) == 0


def test_a_prompt_far_longer_than_the_pool():
    prompt = np.random.default_rng(0).integers(0, 97, 3000).tolist()
    result = generate(MODEL, Corm(window=8, recent=4), [prompt], max_new_tokens=2, chunk=16, capacity=24, pooled=True)
    assert int(usage(result.caches).seen[0]) == 3002
    assert int(usage(result.caches).live.sum(-1).max()) <= 2 * 24


@pytest.mark.parametrize("pooled", [False, True])
def test_decoding_copies_no_keys(pooled):
    """The compiled program updates keys and values in place: no copy of their shape, and no more memory than that."""
    policy, batch = Corm(window=8, recent=4), 3
    caches = MODEL.make_caches(policy, batch=batch, capacity=500, pooled=pooled)
    arguments = jnp.zeros((batch, 97)), jax.random.key(0), jnp.zeros(batch, bool)
    numbers = np.int32(9), np.zeros(1, np.int32), np.float32(0), np.float32(1)
    compiled = decode.lower(MODEL, policy, caches, *arguments, *numbers, steps=4).compile()
    rows = 500 * 2 * batch
    copies = [
        shape
        for shape in re.findall(r"= f32\[([0-9,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
        if math.prod(map(int, shape.split(","))) >= rows * 8
    ]
    assert not copies
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(caches))


def test_pages_hold_every_key_of_a_full_pool():
    """63 keys of one head and 65 of the other fill 128 slots: each head ends in a page that is not full."""
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.repeat([0, 1], [63, 65])).astype(np.int32)
    position = np.zeros(128, np.int32)
    for head in range(2):
        position[owner == head] = rng.permutation((owner == head).sum())
    pool = make_cache(H2O(recent=1), CacheSpec(kv_heads=2, capacity=64, head_dim=4, pooled=True))
    keys, scores = rng.normal(size=(2, 128, 4)).astype(np.float32), rng.normal(size=128).astype(np.float32)
    pool = pool._replace(
        k=jnp.asarray(keys[0]), v=jnp.asarray(keys[1]), position=jnp.asarray(position), head=jnp.asarray(owner),
        state=jnp.asarray(scores), seen=jnp.int32(65),
    )  # fmt: skip
    view, table = jax.jit(cache.paged)(pool)
    live, whose = np.asarray(view.position >= 0), np.broadcast_to(np.asarray(view.head)[:, None], view.position.shape)
    assert live.sum() == 128
    for head in range(2):
        assert sorted(np.asarray(view.position)[live & (whose == head)]) == list(range((owner == head).sum()))
    source = np.asarray(table)[live]
    assert sorted(source) == list(range(128))
    for paged, pooled in ((view.k, keys[0]), (view.v, keys[1]), (view.position, position), (view.state, scores)):
        np.testing.assert_array_equal(np.asarray(paged)[live], pooled[source])
    after = jax.jit(cache.learn)(pool, view.state + 1, table)
    np.testing.assert_array_equal(after.state, scores + 1)


def test_a_head_that_lacks_a_token_adds_nothing_to_its_mean():
    """Token 0 is held by head 0 alone (4), token 1 by both (2 and 6): means over two heads of 2 and 4."""
    owned = jnp.array([[True, True, False, True], [False, False, True, False]])
    pool = Slots(jnp.array([0, 1, 1, -1]), jnp.int32(2), jnp.int32(ENDLESS), owned)
    mean = jax.jit(Slots.mean_over_heads)(pool, jnp.array([4.0, 2.0, 6.0, 0.0]))
    assert mean[:3].tolist() == [2.0, 4.0, 4.0]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_large_cache_fills_to_its_last_slot(pooled):
    """1,100 slots a head, in three pieces, and then those again that were evicted: every key is found in one slot."""
    shape, insert = CacheSpec(kv_heads=2, capacity=1100, head_dim=1, pooled=pooled), jax.jit(cache.insert)
    held, gone = make_cache(Full(), shape), {0, 700, 1023, 1024, 1099}
    for start in (0, 400, 800, 1200):
        keys = jnp.broadcast_to(jnp.arange(start, start + 400, dtype=jnp.float32)[:, None, None], (400, 2, 1))
        held = insert(Full(), held, keys, keys, jnp.int32({800: 300, 1200: 5}.get(start, 400)))
        if start == 800:
            assert np.unique(held.position, return_counts=True)[1].tolist() == [2] * 1100
            held = held._replace(position=jnp.where(jnp.isin(held.position, jnp.array([*gone])), -1, held.position))
    expected = sorted({*range(1105)} - gone)
    for head in range(2):
        own = np.asarray(held.position if pooled else held.position[head])
        own = own[np.asarray(held.head) == head] if pooled else own
        assert sorted(own) == expected
    position, key = np.asarray(held.position), np.asarray(held.k)[..., 0]
    np.testing.assert_array_equal(key % 1200 + 1100 * (key >= 1200), position)
    assert not held.overflow.any()


def test_a_number_for_each_head_keeps_its_dtype():
    owned = jnp.array([[True, False, False], [False, True, True]])
    pool = Slots(jnp.arange(3), jnp.int32(3), jnp.int32(ENDLESS), owned)
    for numbers in (jnp.array([3, 5], jnp.int16), jnp.array([0.5, 2.0], jnp.float16)):
        spread = jax.jit(Slots.spread)(pool, numbers)
        assert spread.dtype == numbers.dtype
        assert spread.tolist() == [numbers[0], numbers[1], numbers[1]]
