"""A decoder of functions: any callables that do what a `corm_jax.Decoder` does.

A function is bound to its parameters with `jax.tree_util.Partial`, which is a pytree, so that JAX sees them:

>>> import jax, jax.numpy as jnp
>>> from jax.tree_util import Partial
>>> import corm_jax as cj
>>> def embed(table, tokens, position):
...     return table[tokens]
>>> def layer(weights, x, position, attend):
...     q, k, v = (jnp.einsum("btd,dhk->bthk", x, weights[name]) for name in "qkv")
...     return x + jnp.einsum("bthk,hkd->btd", attend(q, k, v), weights["out"])
>>> def logits(table, x):
...     return x @ table.T
>>> keys = iter(jax.random.split(jax.random.key(0), 9))
>>> table = jax.random.normal(next(keys), (50, 16))
>>> shapes = {"q": (16, 4, 8), "k": (16, 2, 8), "v": (16, 2, 8), "out": (4, 8, 16)}
>>> layers = [{name: jax.random.normal(next(keys), shape) / 4 for name, shape in shapes.items()} for _ in range(2)]
>>> model = Functions(
...     config=cj.Shape(vocab=50, layers=2, heads=4, kv_heads=2, head_dim=8),
...     embed=Partial(embed, table),
...     layers=tuple(Partial(layer, weights) for weights in layers),
...     logits=Partial(logits, table),
... )
>>> out = cj.generate(model, cj.Corm(window=4, recent=2), [[1, 2, 3], [4]], max_new_tokens=5)
>>> [len(tokens) for tokens in out.tokens]
[5, 5]
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from corm_jax.model.decoder import Shape


class Functions(NamedTuple):
    """A `corm_jax.Decoder`.

    Attributes:
      config: its shape.
      embed: a function ``(tokens, position) -> x``.
      layers: for each layer a function ``(x, position, attend) -> x``.
      logits: a function ``(x) -> logits``.
    """

    config: Shape
    embed: Callable[..., Any]
    layers: tuple[Callable[..., Any], ...]
    logits: Callable[..., Any]


def with_windows(model: Functions) -> Functions:
    """The same decoder, whose shape states the windows that its layers attend with, so that caches hold no more.

    Each layer is traced once with one token.
    """
    windows: list[int | None] = []

    def attend(q, k, v, encoding=None, *, window=None, **form):
        windows.append(window)
        return q

    position = jnp.zeros((1, 1), jnp.int32)
    x = jax.eval_shape(model.embed, position, position)
    for layer in model.layers:
        jax.eval_shape(lambda x, layer=layer: layer(x, position, attend), x)
    return model._replace(config=replace(model.config, windows=tuple(windows) if any(windows) else ()))
