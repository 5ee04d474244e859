"""A second look: attention and what the policy makes of it, as an independent softmax has it; nothing is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import H2O, CacheSpec, begin_prompt, budget, look, make_cache, parse, protect, step
from corm_jax.policies import TOVA
from tests.drive import GROUP, HEAD_DIM, KV_HEADS, TOKENS, normal

LOOK, STEP = jax.jit(look), jax.jit(step)
HELD, AGAIN = 9, 5


def filled(policy, stores, capacity=TOKENS):
    q, k, v = (jnp.asarray(x[:HELD]) for x in normal(1))
    cache = make_cache(policy, CacheSpec(KV_HEADS, capacity, HEAD_DIM, stores=stores))
    return STEP(policy, cache, q, k, v, HELD)[1]


@pytest.mark.parametrize("stores", [None, 1])
@pytest.mark.parametrize("count", [AGAIN, 3, 0])
def test_a_look_adds_the_attention_that_it_pays(stores, count):
    """H2O's sums grow by softmax(q . k / sqrt(d)) over what is held and, causally, the chunk; outputs are its means."""
    policy = H2O(recent=0)
    cache, (_, k, v) = filled(policy, stores), normal(1)
    q2, k2, v2 = (x[:AGAIN] for x in normal(2))
    outputs, after = LOOK(policy, cache, *map(jnp.asarray, (q2, k2, v2)), count)
    added = np.zeros((KV_HEADS, HELD))
    for head in range(KV_HEADS):
        for at in range(count):
            keys, values = (np.concatenate([x[:HELD, head], y[: at + 1, head]]) for x, y in ((k, k2), (v, v2)))
            for one in range(GROUP):
                logits = keys.astype(np.float64) @ q2[at, head, one] / HEAD_DIM**0.5
                alpha = np.exp(logits - logits.max())
                alpha /= alpha.sum()
                added[head] += alpha[:HELD] / GROUP
                np.testing.assert_allclose(outputs[at, head, one], alpha @ values, atol=1e-5)
    position, owner = np.asarray(cache.position), np.asarray(cache.layout.heads(*cache.position.shape))
    grown = np.asarray(after.state - cache.state)
    for head in range(KV_HEADS):
        for key in range(HELD):
            assert grown[(position == key) & (owner == head)] == pytest.approx(added[head, key], abs=1e-5)


POLICIES = [
    parse("corm:window=4,recent=2"),
    parse("adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=4"),
    parse("snapkv:budget=6,window=3"),
    budget(protect(TOVA(), sinks=np.array([0, 2])), 7),
    parse("scissorhands:budget=6,window=5,recent=2"),
    parse("l2norm:budget=5"),
    parse("full"),
]


@pytest.mark.parametrize(
    ("policy", "stores"),
    [
        pytest.param(policy, stores, marks=[pytest.mark.slow] * ((index + (stores or 0)) % 2))
        for index, policy in enumerate(POLICIES)
        for stores in (None, 1)
    ],
)
def test_a_look_changes_nothing_but_the_state(policy, stores):
    """Even where no slot is free. The keys that stand there draw what a step over them would have paid."""
    cache = begin_prompt(make_cache(policy, CacheSpec(KV_HEADS, HELD, HEAD_DIM, stores=stores)), HELD)
    q, k, v = (jnp.asarray(x[:HELD]) for x in normal(1))
    for at in range(0, HELD, 3):
        cache = STEP(policy, cache, *(x[at : at + 3] for x in (q, k, v)), 3)[1]
    columns = [jnp.asarray(x[:AGAIN]) for x in normal(2)]
    outputs, after = LOOK(policy, cache, *columns, AGAIN)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    for name in ("k", "v", "position", "overflow", "layout", "clock"):
        for one, other in zip(*(jax.tree.leaves(getattr(x, name)) for x in (cache, after)), strict=True):
            np.testing.assert_array_equal(one, other)
    # The same keys, and room: a step reads the same, but for what it evicts.
    roomy = begin_prompt(make_cache(policy, CacheSpec(KV_HEADS, HELD + AGAIN, HEAD_DIM, stores=stores)), HELD)
    for at in range(0, HELD, 3):
        roomy = STEP(policy, roomy, *(x[at : at + 3] for x in (q, k, v)), 3)[1]
    np.testing.assert_allclose(outputs, STEP(policy, roomy, *columns, AGAIN)[0], atol=1e-6)
    # What comes next starts anew in its slot, and finds the state that the look left.
    _, later = STEP(policy, after, *(x[:1] for x in columns), 1)
    assert int(later.clock.seen) == HELD + 1
