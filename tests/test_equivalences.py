"""The equivalences that make the cache simple (and one that lets a fused attention stand in)."""

from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corm_jax.core import attention
from corm_jax.core.layout import Apart
from corm_jax.core.observation import Observation
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec
from corm_jax.policies import Corm
from simulator.verify import drive
from tests.heads import HEAD_DIM, TOKENS, heads, padded, slots_of

LOWEST = jax.jit(Slots.lowest)
LOWEST_FEW = jax.jit(partial(Slots.lowest, most=4))
LOWEST_OF_LAYER = jax.jit(Slots.lowest_of_layer)
NEIGHBOURS = jax.jit(Slots.neighbours, static_argnums=(2, 3))
ATTEND, ATTEND_IN_BLOCKS = jax.jit(attention.attend), jax.jit(attention.attended, static_argnums=0)


def columns(head, chunk=1):
    return [padded(x, chunk)[:, None] for x in head]


@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 4.0), window=st.integers(1, 30))
def test_importance_is_one_comparison_with_the_logsumexp(seed, scale, window):
    """alpha >= 1/t  <=>  logit >= logsumexp - ln t: an attention that returns its logsumexp is enough."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(scale * rng.normal(size=(TOKENS, 1, 3, HEAD_DIM)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, TOKENS, HEAD_DIM)), jnp.float32)
    causal = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))[:, None]
    seen = jnp.arange(1, TOKENS + 1)
    _, dense = attention.attend(q, k, k, causal, seen)
    logits = jnp.where(causal, jnp.einsum("thgd,hud->gthu", q, k) * HEAD_DIM**-0.5, -jnp.inf)
    logsumexp = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    t = dense.seen.astype(jnp.float32)
    ratio = np.asarray(dense.probability * t)
    assume((np.abs(ratio[:, 1:] - 1) > 1e-4).all())  # not so close to a tie that rounding decides
    np.testing.assert_array_equal(logits >= logsumexp - jnp.log(t), ratio >= 1)

    fused = Observation(jnp.exp(logits - logsumexp), jnp.ones_like(logsumexp), causal, dense.seen)
    slots = slots_of(np.arange(TOKENS)[None], seen=TOKENS)
    policy = Corm(window=window, recent=1)
    never = policy.init(CacheSpec(1, TOKENS, HEAD_DIM))
    last = policy.observe(never, dense, slots)
    assert (last > never).any()
    np.testing.assert_array_equal(last, policy.observe(never, fused, slots))


@given(head=heads(group=2))
def test_a_grid_of_windows_is_one_vmap(head):
    windows, recents = np.array([1, 3, 5, 40], np.int32), np.array([2, 1, 4, 4], np.int32)
    run = jax.vmap(lambda w, r: drive(Corm(window=w, recent=r), *columns(head), head[0].shape[0], capacity=9, chunk=1))
    outputs, position, _ = run(windows, recents)
    for i in range(4):
        policy = Corm(window=int(windows[i]), recent=int(recents[i]))
        alone = drive(policy, *columns(head), head[0].shape[0], capacity=9, chunk=1)
        np.testing.assert_array_equal(position[i], alone[1])
        np.testing.assert_allclose(outputs[i], alone[0], atol=2e-6)


@given(
    rank=st.lists(st.lists(st.integers(-3, 3), min_size=30, max_size=30), min_size=2, max_size=2),
    empty=st.sets(st.integers(0, 59)),
    counts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_which_are_lowest(rank, empty, counts):
    """One by one, by sorting, and over a layer, as sorting by (rank, position, head) has it; so in a pool."""
    position = np.stack([np.random.default_rng(head).permutation(30) for head in range(2)]).astype(np.int32)
    position[np.isin(np.arange(60).reshape(2, 30), list(empty))] = -1
    rank = np.array(rank, np.int32)
    slots = slots_of(position)
    found = np.asarray(LOWEST(slots, jnp.asarray(rank), jnp.array(counts)))
    order = np.random.default_rng(0).permutation(60)
    pool = slots_of(position.reshape(-1)[order], np.repeat([0, 1], 30)[order])
    shared = LOWEST(pool, jnp.asarray(rank.reshape(-1)[order])[None], jnp.array(counts))
    np.testing.assert_array_equal(shared[0], found.reshape(-1)[order])
    few = LOWEST_FEW(slots, jnp.asarray(rank), jnp.array(counts) % 5)
    np.testing.assert_array_equal(few, LOWEST(slots, jnp.asarray(rank), jnp.array(counts) % 5))
    every = sorted((rank[h, i], position[h, i], h, i) for h, i in np.argwhere(position >= 0))
    for head, count in enumerate(counts):
        expected = [i for _, _, h, i in every if h == head][:count]
        assert set(np.flatnonzero(found[head])) == set(expected)
    heads_ = [h for _, _, h, _ in every[: sum(counts)]]
    assert LOWEST_OF_LAYER(slots, jnp.asarray(rank), sum(counts)).tolist() == [heads_.count(0), heads_.count(1)]


@pytest.mark.parametrize("slots", [65, 100, 127, 128])
def test_blocks_cover_every_slot_once(slots):
    """The last block is partial: its slots count, and those that it shares with the one before count once."""
    rng = np.random.default_rng(slots)
    q = jnp.asarray(rng.normal(size=(TOKENS, 2, 2, HEAD_DIM)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, slots, HEAD_DIM)), jnp.float32) for _ in range(2))
    visible = jnp.ones((TOKENS, 2, slots), bool)
    with patch.object(attention, "KEYS_PER_BLOCK", 64):
        output = jax.jit(lambda *x: attention.attended(Apart(), *x))(q, k, v, visible, visible[0])
    logits = np.einsum("thgd,hcd->thgc", q, k, dtype=np.float64) / HEAD_DIM**0.5
    alpha = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(output, np.einsum("thgc,hcd->thgd", alpha, v), atol=2e-6)


@settings(max_examples=30)
@given(tokens=st.sampled_from([3, 9]), radius=st.sampled_from([1, 3]), seed=st.integers(0, 2**16), empty=st.booleans())
def test_neighbours_are_of_ones_own_head(tokens, radius, seed, empty):
    """Two heads side by side, full or not, in a rectangle and in a pool: as loops over keys have it."""
    rng = np.random.default_rng(seed)
    position = np.stack([rng.permutation(tokens) for _ in range(2)]).astype(np.int32)
    if empty:
        position[rng.random(position.shape) < 0.3] = -1
    values = rng.permutation(2 * tokens).reshape(2, tokens).astype(np.float32)
    expected = {}
    for head, slot in np.argwhere(position >= 0):
        near = (position[head] >= 0) & (np.abs(position[head] - position[head, slot]) <= radius)
        own = values[head][near]
        expected[head, slot] = sorted([*own, *[-1.0] * (2 * radius + 1 - len(own))])
    rectangle = slots_of(position, seen=tokens)
    order = rng.permutation(2 * tokens)
    pool = slots_of(position.reshape(-1)[order], np.repeat([0, 1], tokens)[order], seen=tokens)
    around = np.asarray(NEIGHBOURS(rectangle, jnp.asarray(values), radius, -1.0))
    shared = np.asarray(NEIGHBOURS(pool, jnp.asarray(values.reshape(-1)[order])[None], radius, -1.0))
    assert around.shape == (2 * radius + 1, 2, tokens)
    for (head, slot), own in expected.items():
        assert sorted(around[:, head, slot].tolist()) == own
        (where,) = np.flatnonzero(order == head * tokens + slot)
        assert sorted(shared[:, 0, where].tolist()) == own


def test_keys_in_bfloat16_are_scored_in_float32():
    """Weights come out float32, and 300 equal keys weigh exactly 1/300 each, which bfloat16 could not add up."""
    q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    k = jnp.ones((1, 300, 8), jnp.bfloat16)
    output, observation = attention.attend(q, k, k, jnp.ones((1, 1, 300), bool), jnp.array([300]))
    assert observation.weights.dtype == jnp.float32
    assert float(observation.total[0, 0, 0, 0]) == 300.0
    assert output.dtype == jnp.bfloat16


@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.02, 0.5, 1.0]), filled=st.integers(0, 200))
def test_attention_nobody_looks_at_goes_block_by_block(seed, share, filled):
    """The same output, whatever is live."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(3 * rng.normal(size=(TOKENS, 2, 2, HEAD_DIM)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 200, HEAD_DIM)), jnp.float32) for _ in range(2))
    visible = jnp.asarray((rng.random((TOKENS, 2, 200)) < share) & (np.arange(200) < filled))
    seen = jnp.arange(1, TOKENS + 1)
    plain, _ = ATTEND(q, k, v, visible, seen)
    with patch.object(attention, "KEYS_PER_BLOCK", 64):
        output = ATTEND_IN_BLOCKS(Apart(), q, k, v, visible, visible.any(0))
    np.testing.assert_allclose(output, plain, atol=2e-6)
