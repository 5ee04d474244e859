"""The exact recurrence read many tokens at once, against the loop over tokens of the specification: each decision."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corm_jax import CacheSpec, Corm, Full, begin_prompt, make_cache, parse
from corm_jax.core.step import read
from simulator.held import by_head
from tests.drive import GROUP, HEAD_DIM, KV_HEADS, TOKENS, at_clock, in_numpy

CLOSE = 1e-4
SIZE = 7  # tokens of a piece, padded
SPECS = [
    "corm:window=6,recent=2",
    "corm:window=5,recent=3,group=mean,threshold=live,multiple=2",
    "corm:window=9,recent=1,eager=true,sinks=1",
    "corm:window=6,recent=2,oneshot=true",
    "corm:window=6,recent=2,budget=5",
    "adaptive_corm:window=3,recent=2,multiple=1,patience=3,trial=5",
    "h2o:recent=2,budget=5",
    "h2o:recent=2,attention=mean,budget=0.4",
    "tova:budget=5",
    "scissorhands:budget=6,window=5,recent=2",
    "streaming_llm:sinks=2,budget=6",
    "window:size=6",
    "snapkv:budget=6,window=3,kernel=3",
    "adakv:budget=6,window=2,kernel=3",
    "l2norm:budget=5",
    "full",
]


@partial(jax.jit, static_argnames=("capacity", "stores", "block", "known"))
def in_pieces(policy, q, k, v, counts, prompt, start=0, *, capacity, stores, block, known=None):
    """Outputs ``[pieces, SIZE, ...]``, what heads hold after each piece, overflow, live keys and passes."""
    cache = make_cache(policy, CacheSpec(KV_HEADS, capacity, HEAD_DIM, stores=stores))
    cache = begin_prompt(at_clock(cache, seen=jnp.asarray(start, jnp.int32)), prompt)
    cache = cache._replace(made=replace(cache.made, block=block, moments=known))

    def body(carry, count):
        cache, at = carry
        pieces = (jax.lax.dynamic_slice_in_dim(x, at, SIZE) for x in (q, k, v))
        output, cache, live, passes = read(policy, cache, *pieces, count, chunk=1)
        return (cache, at + count), (output, by_head(cache), live, passes)

    (cache, _), found = jax.lax.scan(body, (cache, jnp.int32(0)), counts)
    return *found, cache.overflow


def columns(seed, peak):
    """Small whole numbers, so that equal logits are equal, or numbers of which no two are."""
    rng = np.random.default_rng(seed)
    shapes = (TOKENS, KV_HEADS, GROUP, HEAD_DIM), (TOKENS, KV_HEADS, HEAD_DIM), (TOKENS, KV_HEADS, HEAD_DIM)
    if seed % 2:
        q, k, v = (rng.integers(-size, size + 1, shape) for size, shape in zip((peak, 2, 2), shapes, strict=True))
    else:
        q, k, v = (rng.normal(size=shape) for shape in shapes)
        q = q * peak
    return [x.astype(np.float32) for x in (q * (1 + np.arange(KV_HEADS)[:, None, None] / 16), k, v)]


def pieces_of(sizes, tokens):
    counts = np.diff(np.minimum(np.cumsum([0, *sizes]), tokens))
    return np.array([*counts, *[0] * (TOKENS - len(counts))], np.int32)


def padded(x):
    return np.concatenate([x, np.full((SIZE, *x.shape[1:]), 7.0, np.float32)])


def agree(found, expected, counts, close=2e-5):
    outputs, position, live, passes, overflow = map(np.asarray, found)
    clock = counts.cumsum()
    rows = np.concatenate([out[:count] for out, count in zip(outputs, counts, strict=True)])
    for head, reading in enumerate(expected):
        for at, (count, now) in enumerate(zip(counts, clock, strict=True)):
            if now:
                assert {int(p) for p in position[at, head] if p >= 0} == reading.kept[now - 1], (head, now)
            for step in range(count):
                assert live[at, step, head] == len(reading.kept[now - count + step]), (head, now - count + step + 1)
        assert overflow[head] == reading.overflow
        np.testing.assert_allclose(rows[:, head], reading.outputs[: len(rows)], atol=close)
    assert (passes[counts > 0] >= 1).all()
    assert passes.max() <= SIZE + 1


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=24)
@given(
    seed=st.integers(0, 2**16),
    peak=st.integers(1, 6),
    sizes=st.lists(st.integers(0, SIZE), min_size=3, max_size=TOKENS),
    tight=st.booleans(),
    prompt=st.integers(1, TOKENS),
)
def test_a_block_is_as_token_by_token(spec, seed, peak, sizes, tight, prompt):
    """With slots for all in a rectangle, and too few in a pool; or the other way round."""
    capacity, stores, block = (8, 1, 5) if tight else (TOKENS, None, 7)
    if SPECS.index(spec) % 2:
        capacity, stores, block = (8, None, 7) if tight else (TOKENS, 1, 5)
    policy, (q, k, v), counts = parse(spec), columns(seed, peak), pieces_of(sizes, TOKENS)
    tokens = int(counts.sum())
    assume(tokens)
    prompt = min(prompt, tokens)
    if policy.__class__.__name__ in ("SnapKV", "AdaKV") or "oneshot" in spec:
        capacity = TOKENS
    expected = in_numpy(
        policy, *(x[:tokens] for x in (q, k, v)), [1] * tokens, capacity=capacity, stores=stores, prompts={0: prompt}
    )
    assume(min(reading.margin for reading in expected) > CLOSE)
    found = in_pieces(policy, *map(padded, (q, k, v)), counts, prompt, capacity=capacity, stores=stores, block=block)
    agree(found, expected, counts)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    window=st.integers(1, 12),
    recent=st.integers(1, 5),
    multiple=st.integers(1, 3),
    scale=st.sampled_from([1.0, 40.0, 300.0]),
    eager=st.booleans(),
)
def test_windows_shorter_than_a_block_and_logits_far_apart(seed, window, recent, multiple, scale, eager):
    """Whether the moments of all keys are known shows only when it runs; exponentials that would overflow do not."""
    policy = Corm(window=window, recent=recent, multiple=multiple, eager=eager)
    (q, k, v), counts = columns(2 * seed, scale), pieces_of([SIZE] * 3, TOKENS)
    expected = in_numpy(policy, q, k, v, [1] * TOKENS)
    assume(min(reading.margin for reading in expected) > CLOSE)
    found = in_pieces(policy, *map(padded, (q, k, v)), counts, TOKENS, capacity=TOKENS, stores=None, block=SIZE)
    agree(found, expected, counts, close=1e-3)  # of logits in the hundreds the last digits are that large


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    at=st.integers(0, TOKENS - 1),
    head=st.integers(0, 1),
    wrong=st.sampled_from([np.nan, np.inf]),
)
def test_what_is_not_a_number_in_a_block(seed, at, head, wrong):
    for spec in ("corm:window=8,recent=2", "h2o:recent=2,budget=5"):
        policy, (q, k, v), counts = parse(spec), columns(2 * seed, 2), pieces_of([SIZE] * 3, TOKENS)
        k[at, head, 0] = wrong
        with np.errstate(invalid="ignore"):
            expected = in_numpy(policy, q, k, v, [1] * TOKENS)
        assume(min(reading.margin for reading in expected) > CLOSE)
        found = in_pieces(policy, *map(padded, (q, k, v)), counts, TOKENS, capacity=TOKENS, stores=None, block=SIZE)
        agree(found, expected, counts)


@settings(max_examples=20)
@given(
    seeds=st.lists(st.integers(0, 2**16), min_size=3, max_size=3, unique=True),
    lengths=st.tuples(*[st.integers(0, TOKENS)] * 3),
)
def test_rows_of_a_batch_are_as_if_alone(seeds, lengths):
    """A row that overflows makes all rows be read query by query, and changes nothing in them."""
    for spec, capacity in (("corm:window=8,recent=2", 9), ("tova:budget=5", TOKENS)):
        policy, rows = parse(spec), [columns(2 * seed, 2) for seed in seeds]
        q, k, v = (np.stack([padded(row[i]) for row in rows]) for i in range(3))
        counts = np.stack([pieces_of([SIZE] * 3, length) for length in lengths])
        run = partial(in_pieces, policy, capacity=capacity, stores=None, block=SIZE)
        together = jax.vmap(run)(q, k, v, counts, np.maximum(lengths, 1).astype(np.int32))
        for row, length in enumerate(lengths):
            if length:
                expected = in_numpy(policy, *(x[:length] for x in rows[row]), [1] * length, capacity=capacity)
                assume(min(reading.margin for reading in expected) > CLOSE)
                agree([x[row] for x in together], expected, counts[row])


def test_passes():
    """Where nothing is evicted within a block one pass is enough; where a key is, another one confirms it."""
    (q, k, v), counts = columns(4, 3), pieces_of([SIZE] * 3, TOKENS)
    how = {"capacity": TOKENS, "stores": None, "block": SIZE}
    *_, passes, _ = in_pieces(Full(), *map(padded, (q, k, v)), counts, TOKENS, **how)
    assert (np.asarray(passes)[:3] == 1).all()
    *_, passes, _ = in_pieces(Corm(window=30, recent=2), *map(padded, (q, k, v)), counts, TOKENS, **how)
    assert (np.asarray(passes)[:3] == 1).all()
    *_, passes, _ = in_pieces(Corm(window=7, recent=2), *map(padded, (q, k, v)), counts, TOKENS, **how)
    assert np.asarray(passes)[:3].tolist()[0] == [1]
    assert np.asarray(passes)[1:3].max() > 1
