"""The GPU's kernel, interpreted, against a softmax in NumPy: pools of several stretches, heads that see nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import kernel
from corm_jax.attention import attend

SHAPES = {"grouped": (3, 3, 16, 300), "one": (1, 1, 32, 37), "as many as Llama": (32, 1, 16, 600)}


def attended(q, k, v, seen_by):
    """Output, probabilities and how much each head sums up, slot by slot in float64."""
    kv_heads, group, head_dim = q.shape
    output, alpha = np.zeros(q.shape), np.zeros((group, len(k)))
    for head in range(kv_heads):
        slots = [slot for slot in range(len(k)) if seen_by[slot] == head]
        for member in range(group if slots else 0):
            logits = np.array([q[head, member] @ k[slot] for slot in slots]) / head_dim**0.5
            weights = np.exp(logits - logits.max())
            alpha[member, slots] = weights / weights.sum()
            output[head, member] = sum(w * v[slot] for w, slot in zip(alpha[member, slots], slots, strict=True))
    return output, alpha


def drawn(name, seed):
    kv_heads, group, head_dim, pool = SHAPES[name]
    rng = np.random.default_rng(seed)
    q = 3 * rng.normal(size=(kv_heads, group, head_dim))
    k, v = rng.normal(size=(2, pool, head_dim))
    head, visible = rng.integers(0, kv_heads, pool), rng.random(pool) < 0.8
    if kv_heads > 1:
        visible &= head != 1
    k[~visible] = np.nan  # what nobody sees does not matter
    return q, k, v, head, visible


@pytest.mark.parametrize("name", SHAPES)
def test_attends(name):
    cases = [drawn(name, seed) for seed in range(4)]
    scale = SHAPES[name][2] ** -0.5
    rows, k, v, head, visible = (jnp.asarray(np.stack(x)) for x in zip(*cases, strict=True))
    rows, k, v = (x.astype(jnp.float32) for x in (rows[:, :, :, None], k, v))
    owned = head[:, None] == jnp.arange(SHAPES[name][0])[:, None]
    run = jax.jit(jax.vmap(partial(kernel.attend_pool, scale=scale, interpret=True)))
    output, weights, total = (np.asarray(x) for x in run(rows, k, v, visible[:, None], owned))
    for row, (q, keys, values, whose, seen) in enumerate(cases):
        expected, alpha = attended(q, keys, values, np.where(seen, whose, -1))
        np.testing.assert_allclose(output[row, :, :, 0], expected, atol=2e-5)
        np.testing.assert_allclose((weights / total)[row, :, 0], alpha, atol=2e-6)


def test_equal_logits_are_exactly_equal():
    """So that alpha >= 1/n is as exact as in plain attention, however many stretches there are."""
    pool = 700
    arguments = jnp.ones((1, 1, 1, 16)), jnp.ones((pool, 16)), jnp.ones((pool, 16))
    masks = jnp.ones((1, pool), bool), jnp.ones((1, pool), bool)
    _, weights, total = kernel.attend_pool(*arguments, *masks, scale=0.25, interpret=True)
    assert (weights == 1).all()
    assert (total == pool).all()


def test_says_what_plain_attention_says():
    """The same interface: `corm_jax.attention.attend` with and without it."""
    q, k, v, head, visible = drawn("grouped", 7)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    owned = jnp.asarray(head) == jnp.arange(3)[:, None]
    output, observation = attend(q[None], k, v, jnp.asarray(visible)[None], jnp.array([9]), owned)
    assert kernel.supports(q[:, :, None], k)
    same, weights, total = kernel.attend_pool(
        q[:, :, None], k, v, jnp.asarray(visible)[None], owned, scale=0.25, interpret=True
    )
    np.testing.assert_allclose(same[:, :, 0], output[0], atol=1e-5)
    np.testing.assert_allclose(weights / total, observation.probability, atol=1e-6)
