"""A policy that merges what leaves into what stays, and refuses some at the door: against loops in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import CormError, Policy, Traits, budget, policy, protect
from corm_jax.policies import number
from simulator.replay import replay
from simulator.synthetic import noise
from tests.drive import GROUP, HEAD_DIM, KV_HEADS, TOKENS, in_cache, normal
from tests.heads import chunks_of


@policy
class Pairs(Policy):
    """Keys at odd positions are refused, and of the others the newest stay. What leaves enters the nearest that stays.

    It enters as a mean: a key stands for as many as have entered it.
    """

    keys: int = number(4, "newest keys that stay", least=1)

    @property
    def traits(self):
        return Traits(needs=(), merges=True)

    def init(self, spec):
        return jnp.ones(spec.slots, jnp.float32)

    def retain(self, state, slots):
        even = slots.restrict(slots.live & (slots.position % 2 == 0))
        return even.live & ~even.lowest(even.position, even.sum_per_head(even.live) - self.keys)

    def score(self, state, slots):
        return slots.position

    def merged(self, k, v, state, slots, keep):
        position, head = slots.position.reshape(-1), slots.head.reshape(-1)
        leaves, stays = (slots.live & ~keep).reshape(-1), (slots.live & keep).reshape(-1)
        distance = 2 * jnp.abs(position[:, None] - position) + (position > position[:, None]).astype(jnp.int32)
        distance = jnp.where((head[:, None] == head) & stays, distance, 10**6)
        nearest = (distance == distance.min(1, keepdims=True)) & (distance < 10**6) & leaves[:, None]
        weight = state.reshape(-1)
        share = jnp.where(nearest, weight[:, None], 0.0) + jnp.diag(weight)  # [from, to]
        total = share.sum(0)
        k, v = ((share.T @ x.reshape(-1, x.shape[-1]) / total[:, None]).reshape(x.shape) for x in (k, v))
        return k, v, total.reshape(state.shape)


def enter(held, leaving):
    """Some keys of a head leave for the nearest that stays: ``held[position] = [key, value, weight]``."""
    gone = {i: held.pop(i) for i in leaving}
    before = {i: weight for i, (_, _, weight) in held.items()}
    sums = {i: [held[i][0] * before[i], held[i][1] * before[i], before[i]] for i in held}
    for i, (key, value, weight) in gone.items():
        if held:
            near = min(held, key=lambda j: (abs(i - j), j > i))
            sums[near] = [a + weight * b for a, b in zip(sums[near], (key, value, 1.0), strict=True)]
    for i, (key, value, weight) in sums.items():
        held[i] = [key / weight, value / weight, weight]


def in_loops(q, k, v, counts, keys, capacity, shared):
    heads, kept, outputs, lost = [{} for _ in range(KV_HEADS)], [], np.zeros(q.shape), np.zeros(KV_HEADS, int)
    start = 0
    for size in counts:
        groups = [range(KV_HEADS)] if shared else [[head] for head in range(KV_HEADS)]
        for group in groups:
            every = sorted((i, head) for head in group for i in heads[head])
            over = every[: max(len(every) + (size - capacity) * len(group), 0)]
            for head in group:
                lost[head] += len(out := [i for i, owner in over if owner == head])
                enter(heads[head], out)
        for head, held in enumerate(heads):
            held |= {i: [k[i, head].astype(float), v[i, head].astype(float), 1.0] for i in range(start, start + size)}
            for t in range(start, start + size):
                seen = [i for i in held if i <= t]
                for one in range(GROUP):
                    logits = np.array([q[t, head, one] @ held[i][0] for i in seen]) / HEAD_DIM**0.5
                    alpha = np.exp(logits - logits.max())
                    outputs[t, head, one] = alpha @ np.array([held[i][1] for i in seen]) / alpha.sum()
            stay = sorted(i for i in held if i % 2 == 0)[-keys:]
            enter(held, [i for i in held if i not in stay])
        kept.append([set(held) for held in heads])
        start += size
    return outputs, kept, lost, heads


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("stores", [None, 1])
@pytest.mark.parametrize("capacity", [TOKENS, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_leaves_is_merged(chunk, stores, capacity, wrapped):
    columns, counts = normal(chunk), chunks_of(TOKENS, chunk)
    pairs = budget(protect(Pairs(keys=9), recent=0), 5) if wrapped else Pairs(keys=5)
    outputs, held, cache = in_cache(pairs, *columns, counts, capacity=capacity, stores=stores)
    expected, kept, lost, heads = in_loops(*columns, counts, 5, capacity, stores == 1)
    np.testing.assert_allclose(outputs, expected, atol=2e-5)
    assert [[held[head][at] for head in range(KV_HEADS)] for at in range(len(counts))] == kept
    assert np.asarray(cache.overflow).tolist() == lost.tolist()
    assert lost.any() == (capacity == 4)
    position, owner = np.asarray(cache.position), np.asarray(cache.layout.heads(*cache.position.shape))
    for head, keys in enumerate(heads):
        for i, (key, value, weight) in keys.items():
            at = (position == i) & (owner == head)
            np.testing.assert_allclose(np.asarray(cache.k)[at][0], key, atol=2e-5)
            np.testing.assert_allclose(np.asarray(cache.v)[at][0], value, atol=2e-5)
            assert np.asarray(cache.state)[at][0] == pytest.approx(weight)


def test_a_replay_cannot_merge():
    with pytest.raises(
        CormError, match="Pairs merges keys, and a trace holds the keys unmerged: use the policy in a cache"
    ):
        replay(noise(steps=20), Pairs())
