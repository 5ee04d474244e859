"""Blocks of Flax linen and NNX with their own attention, and functions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.tree_util import Partial

from corm_jax import Shape
from corm_jax.adapters import Functions
from corm_jax.adapters import linen as linen_adapter
from corm_jax.adapters import nnx as nnx_adapter
from tests.decoders import IDS, TOKENS, VOCAB, check

SHAPE = Shape(vocab=VOCAB, layers=2, heads=4, kv_heads=4, head_dim=8)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic):
        inner, mask = linen.LayerNorm()(x), linen.make_causal_mask(x[..., 0])
        attention = linen.MultiHeadDotProductAttention(
            num_heads=4, dropout_rate=0.5, normalize_qk=True, name="attention"
        )
        x = x + attention(inner, mask=mask, deterministic=deterministic)
        return x + linen.Dense(32)(linen.gelu(linen.Dense(64)(linen.LayerNorm()(x))))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(32, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, 32, dropout_rate=0.5, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x, deterministic=False):
        x = x + self.attention(self.norms[0](x), is_causal=True, deterministic=deterministic, decode=False)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


def embed(tables, tokens, position):
    return tables["token"][tokens] + tables["position"][position]


def logits(tables, x):
    return x @ tables["token"].T


def tables():
    rng = np.random.default_rng(3)
    return {name: jnp.asarray(rng.normal(size=(VOCAB, 32)), jnp.float32) for name in ("token", "position")}


def around(layers):
    return Functions(SHAPE, Partial(embed, tables()), tuple(layers), Partial(logits, tables()))


def through(layers):
    """The logits, by the blocks as they are."""
    x = embed(tables(), IDS, np.arange(TOKENS))
    for layer in layers:
        x = layer(x)
    return np.asarray(logits(tables(), x))


def sharp(tree):
    """Weights with which heads differ."""
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def test_linen():
    block = LinenBlock()
    weights = [sharp(block.init(jax.random.key(seed), jnp.zeros((1, 1, 32)), True)) for seed in range(2)]
    expected = through([lambda x, one=one: block.apply(one, x, True) for one in weights])
    layers = [linen_adapter.layer(block, one, deterministic=True) for one in weights]
    check(around(layers), expected)
    assert jax.tree.structure(layers[0]) == jax.tree.structure(layers[1])  # they share a program


def test_nnx():
    blocks = [sharp(NNXBlock(nnx.Rngs(seed))) for seed in range(2)]
    expected = through([lambda x, block=block: block(x, deterministic=True) for block in blocks])
    layers = [nnx_adapter.layer(block, deterministic=True) for block in blocks]
    check(around(layers), expected)
    np.testing.assert_array_equal(through([lambda x, b=b: b(x, deterministic=True) for b in blocks]), expected)
