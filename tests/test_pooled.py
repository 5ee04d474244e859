"""The pooled layout: policies in it under the conformance suite, slot by slot, and chunk by chunk in pages."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corm_jax import CacheSpec, Corm, Full, begin_prompt, decode, generate, make_cache, parse, step, usage
from corm_jax.core.layout import Apart, Shared
from corm_jax.core.slots import Slots
from corm_jax.core.storing import insert
from corm_jax.model.decoder import make_caches
from simulator.held import by_head
from simulator.subject import Implementation
from simulator.testing import parametrize_checks
from tests.checks import quick
from tests.drive import TOKENS, in_cache, in_numpy
from tests.heads import chunks_of, slots_of
from tests.models import tiny

MODEL = tiny()

SLOTS = [
    "corm:window=4,recent=2",
    "scissorhands:budget=6,window=5,recent=2",
    "tova:budget=5",
    "adaptive_corm:window=3,recent=2,multiple=1,patience=3,trial=5",
]
FURTHER = [
    "corm:window=4,recent=2,group=mean,threshold=live,sinks=1",
    "h2o:recent=2,budget=5",
    "adaptive_corm:window=2,recent=1,multiple=2,patience=2,trial=4,sinks=1",
    "adakv:budget=6,window=2,kernel=3",
]


SHARING = [*SLOTS, *FURTHER, "streaming_llm:sinks=2,budget=6", "l2norm:budget=5", "snapkv:budget=6,window=3", "full"]


@quick(parametrize_checks(*map(parse, SLOTS), implementation=Implementation(stores=1), examples=4))
def test_conformance(check):
    check()


@pytest.mark.nightly
@parametrize_checks(*map(parse, FURTHER), implementation=Implementation(stores=1), examples=3)
def test_conformance_of_further_policies(check):
    check()


@pytest.mark.parametrize(
    ("spec", "chunk", "capacity"),
    [(spec, chunk, (TOKENS, 7)[(index + chunk // 2) % 2]) for index, spec in enumerate(SHARING) for chunk in (1, 3)],
)
def test_two_stores_of_two_heads_each(spec, chunk, capacity):
    """Heads share a store with their neighbour alone: keys, overflow and outputs of the specification."""
    rng, counts = np.random.default_rng(len(spec)), chunks_of(TOKENS, chunk)
    shapes = (TOKENS, 4, 2, 4), (TOKENS, 4, 4), (TOKENS, 4, 4)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    q *= 1 + np.arange(4, dtype=np.float32)[:, None, None] / 2  # heads that keep differently many
    capacity = TOKENS if capacity < TOKENS and parse(spec).traits.whole_prompt else capacity
    how = {"capacity": capacity, "stores": 2, "prompts": {0: 14}}
    outputs, held, cache = in_cache(parse(spec), q, k, v, counts, **how)
    expected = in_numpy(parse(spec), q, k, v, counts, **how)
    assert min(reading.margin for reading in expected) > 1e-5
    for head, reading in enumerate(expected):
        assert held[head] == reading.kept
        assert int(cache.overflow[head]) == reading.overflow
        np.testing.assert_allclose(outputs[:, head], reading.outputs, atol=2e-5)


@pytest.mark.parametrize("spec", ["corm:window=4,recent=2", "tova:budget=5", "snapkv:budget=6,window=3", "full"])
def test_pages_that_are_not_used_are_not_attended_to(spec, monkeypatch):
    """Of two texts, one fills more than the part of the pool that is asked for in its last chunks, one does not."""
    policy, rng = parse(spec), np.random.default_rng(0)
    shapes = (2, TOKENS, 2, 2, 4), (2, TOKENS, 2, 4), (2, TOKENS, 2, 4)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    counts = np.array([[3] * 6, [3, 3, 0, 0, 0, 0]], np.int32)
    asked = []

    def run(many):
        monkeypatch.setattr("corm_jax.core.layout.MANY", many)

        def one(q, k, v, counts):
            def body(cache, xs):
                start, count = xs
                part = (jax.lax.dynamic_slice_in_dim(x, start, 3) for x in (q, k, v))
                output, cache = step(policy, cache, *part, count)
                few = cache.layout.few(cache.position)
                return cache, (output, by_head(cache), jnp.asarray(True) if few is None else few)

            cache = begin_prompt(make_cache(policy, CacheSpec(2, 10, 4, stores=1)), 9)
            return jax.lax.scan(body, cache, (jnp.minimum(3 * jnp.arange(6), TOKENS - 3), counts))[1]

        outputs, position, few = jax.jit(jax.vmap(one))(q, k, v, counts)
        asked.append(np.asarray(few))
        return np.asarray(outputs), np.sort(position, -1)

    (outputs, held), (expected, wanted) = run(0), run(math.inf)
    np.testing.assert_array_equal(held, wanted)
    real = np.repeat(counts > 0, 3, 1).reshape(2, 6, 3)
    np.testing.assert_allclose(outputs[real], expected[real], atol=2e-6)
    assert asked[0][1].all()
    assert asked[0][0, 0]
    assert not asked[0][0].all() or spec != "full"
    assert asked[1].all()


@pytest.mark.parametrize("stores", [1, 2, 6])
@pytest.mark.parametrize("live", [0.7, 1.0])
def test_newcomers_take_free_slots_and_then_the_lowest(stores, live):
    """Free slots first, then the lowest score, among equals the oldest, then the first head: as by sorting."""
    rng, policy, kv_heads, least = np.random.default_rng(stores), Corm(window=99, recent=1), 6, -(2**31)
    cache = make_cache(policy, CacheSpec(kv_heads=kv_heads, capacity=8, head_dim=4, stores=stores))
    size, each, run = cache.position.shape[1], kv_heads // stores, jax.jit(insert)
    for _ in range(20):
        # A head holds a position once. Few ranks and positions, so that there are ties.
        pairs = np.array([[rng.permutation(each * 9)[:size]] for _ in range(stores)])[:, 0]
        head = each * np.arange(stores)[:, None] + pairs % each
        position = np.where(rng.random(pairs.shape) < live, pairs // each, -1)
        state = rng.choice([least, 0, 1, 2**31 - 1], pairs.shape)
        layout = cache.layout if stores == kv_heads else Shared(jnp.asarray(pairs % each, jnp.int32), each)
        held = cache._replace(
            position=jnp.asarray(position, jnp.int32),
            state=jnp.asarray(state, jnp.int32),
            clock=replace(cache.clock, seen=jnp.int32(50)),
            layout=layout,
        )
        news = jnp.arange(4.0 * kv_heads).reshape(kv_heads, 4)
        found = run(policy, held, news, news, jnp.bool_(True))
        order = np.lexsort((head, position, np.where(position < 0, least, state)))[:, :each]
        store = np.arange(stores)[:, None]
        lost = np.bincount(head[store, order][position[store, order] >= 0], minlength=kv_heads)
        position[store, order] = 50
        state[store, order] = least
        whose = each * store + np.arange(each)
        np.testing.assert_array_equal(found.position, position)
        np.testing.assert_array_equal(found.state, state)
        np.testing.assert_array_equal(found.overflow, lost)
        np.testing.assert_array_equal(found.k[store, order], news[whose])
        np.testing.assert_array_equal(Slots(found.position, 0, 0, found.layout).head[store, order], whose)


@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 200), min_size=2, max_size=2), chunk=st.sampled_from([1, 16]))
def test_generates_as_from_rectangles(lengths, chunk):
    """Rows of different lengths, chunks that are gathered into pages, and decoding slot by slot."""
    prompts = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in lengths]
    policy, options = Corm(window=12, recent=6), {"max_new_tokens": 24, "chunk": chunk, "capacity": 240}
    one, other = (generate(MODEL, policy, prompts, **options, stores=stores) for stores in (None, 1))
    assert (one.caches[0].layout, type(other.caches[0].layout)) == (Apart(), Shared)
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(usage(one.caches).live, usage(other.caches).live)
    assert int(usage(other.caches).overflow.sum()) == 0


def test_a_prompt_far_longer_than_the_pool():
    prompt = np.random.default_rng(0).integers(0, 97, 3000).tolist()
    result = generate(MODEL, Corm(window=8, recent=4), [prompt], max_new_tokens=2, chunk=16, capacity=24, stores=1)
    assert int(usage(result.caches).seen[0]) == 3002
    assert int(usage(result.caches).live.sum(-1).max()) <= 2 * 24


@pytest.mark.parametrize("stores", [None, 1])
def test_decoding_copies_no_keys(stores):
    """The compiled program updates keys and values in place: no copy of their shape, and no more memory than that."""
    policy, batch = Corm(window=8, recent=4), 3
    caches = make_caches(MODEL, policy, batch=batch, capacity=500, stores=stores)
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
    keys, scores = rng.normal(size=(1, 128, 4)).astype(np.float32), rng.normal(size=(1, 128)).astype(np.float32)

    @jax.jit
    def opened(layout, position, keys, scores):
        pages = layout.opened(position)
        held = pages.take(position, -1), pages.take(keys, rows=True), pages.take(scores)
        several = pages.take(jnp.stack([scores, -scores]))
        return held, pages.layout.heads(*held[0].shape), [pages.back(x) for x in (held[0], held[2], several)]

    (paged, key, score), whose, back = opened(Shared(jnp.asarray(owner)[None], 2), position[None], keys, scores)
    live, whose = np.asarray(paged >= 0), np.asarray(whose)
    assert live.sum() == 128
    for head in range(2):
        assert sorted(np.asarray(paged)[live & (whose == head)]) == list(range((owner == head).sum()))
    for page, slot in np.argwhere(live):
        (at,) = np.flatnonzero((owner == whose[page, slot]) & (position == int(paged[page, slot])))
        assert (np.asarray(key)[page, slot] == keys[0, at]).all()
        assert float(score[page, slot]) == scores[0, at]
    for one, other in zip(back, (position[None], scores, np.stack([scores, -scores])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_head_that_lacks_a_token_adds_nothing_to_its_mean():
    """Token 0 is held by head 0 alone (4), token 1 by both (2 and 6): means over two heads of 2 and 4."""
    pool = slots_of([0, 1, 1, -1], [0, 0, 1, 0], seen=2)
    mean = jax.jit(Slots.mean_over_heads)(pool, jnp.array([[4.0, 2.0, 6.0, 0.0]]))
    assert mean[0, :3].tolist() == [2.0, 4.0, 4.0]


@pytest.mark.parametrize("stores", [None, 1])
def test_a_large_cache_fills_to_its_last_slot(stores):
    """1,100 slots a head, in three pieces, and then those again that were evicted: every key is found in one slot."""
    held = make_cache(Full(), CacheSpec(kv_heads=2, capacity=1100, head_dim=1, stores=stores))
    gone, run = {0, 700, 1023, 1024, 1099}, jax.jit(partial(step, Full()))
    for start in (0, 400, 800, 1200):
        keys = jnp.broadcast_to(jnp.arange(start, start + 400, dtype=jnp.float32)[:, None, None], (400, 2, 1))
        _, held = run(held, keys[:, :, None], keys, keys, jnp.int32({800: 300, 1200: 5}.get(start, 400)))
        if start == 800:
            assert np.unique(held.position, return_counts=True)[1].tolist() == [2] * 1100
            held = held._replace(position=jnp.where(jnp.isin(held.position, jnp.array([*gone])), -1, held.position))
    expected = sorted({*range(1105)} - gone)
    for head in np.asarray(by_head(held)):
        assert sorted(head[head >= 0]) == expected
    position, key = np.asarray(held.position), np.asarray(held.k)[..., 0]
    np.testing.assert_array_equal(key % 1200 + 1100 * (key >= 1200), position)
    assert not held.overflow.any()


def test_a_number_for_each_head_keeps_its_dtype():
    pool = slots_of(np.arange(3), [0, 1, 1], seen=3)
    for numbers in (jnp.array([3, 5], jnp.int16), jnp.array([0.5, 2.0], jnp.float16)):
        spread = jax.jit(Slots.broadcast)(pool, numbers)
        assert spread.dtype == numbers.dtype
        assert spread.tolist() == [[float(numbers[0]), float(numbers[1]), float(numbers[1])]]
