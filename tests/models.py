"""Tiny models that tests can afford, with weights drawn at random."""

import jax.numpy as jnp
from flax import nnx

from corm_jax import Config, Transformer
from corm_jax.core.positions import Rope


def tiny(kv_heads=2, layers=2, tied=True, dtype=jnp.float32, seed=0, vocab=97, windows=(), **form):
    config = Config(
        vocab=vocab,
        dim=32,
        hidden=48,
        layers=layers,
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        norm_eps=1e-5,
        tied=tied,
        context=512,
        windows=windows,
        **{"rope": Rope(), **form},
    )
    model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(seed))
    for layer in model.layers:  # attention as initialised is nearly uniform: sharpen it, so that keys differ
        layer.attention.q.kernel[...] *= 12
    return model
