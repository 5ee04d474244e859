"""Tiny models that tests can afford, with weights drawn at random."""

from dataclasses import fields
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from corm_jax import Config, Llama, Shape
from corm_jax.adapters.functions import Functions
from corm_jax.core.positions import Rope


def tiny(kv_heads=2, layers=2, tied=True, dtype=jnp.float32, seed=0, vocab=97):
    config = Config(
        vocab=vocab,
        dim=32,
        hidden=48,
        layers=layers,
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        norm_eps=1e-5,
        rope=Rope(),
        tied=tied,
        context=512,
    )
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(seed))
    for layer in model.layers:  # attention as initialised is nearly uniform: sharpen it, so that keys differ
        layer.attention.q.kernel[...] *= 12
    return model


def local(windows, **how):
    """A decoder with local layers, those of `tiny` with a window each, or None."""
    model = tiny(layers=len(windows), **how)
    functions = {window: partial(_through_window, window=window) for window in windows}
    layers = zip(model.layers, windows, strict=True)
    return Functions(
        config=Shape(
            **{field.name: getattr(model.config, field.name) for field in fields(Shape)} | {"windows": windows}
        ),
        embed=Partial(type(model).embed, model),
        layers=tuple(Partial(functions[window], layer) for layer, window in layers),
        logits=Partial(type(model).logits, model),
    )


def _through_window(layer, x, position, attend, *, window):
    return layer(x, position, partial(attend, window=window))
