"""What a model's prediction loses when its heads forget, to first order.

Let the output of every key-value head be a mixture, ``g`` of what its queries read from all keys and ``1 - g`` of what
they read from the first `SINKS` and the newest `WINDOW`, and L(g) the mean negative log-likelihood of some tokens. With
``o[t, h]`` the outputs, what a change of them costs is averaged over the way from the window to everything:

    G[t, h]  =  integral over g from 0 to 1 of  dL / do[t, h]          L changes by about  sum over t, h of  G . change

These are integrated gradients (Sundararajan et al., arXiv 1703.01365): a gradient at g = 1 alone would say that a head
is worth nothing where another could stand in for it, though not both can go. The integral is a Gauss-Legendre sum.
Layers are run one at a time, forward and back, so memory holds the attention of one.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from corm_jax.model import Llama

SINKS, WINDOW = 4, 128


def worth(
    model: Llama,
    tokens: Sequence[int],
    first: int,
    nodes: int,
    *,
    progress: Callable[[], None] = lambda: None,
) -> list[Float[np.ndarray, "tokens kv_heads group head_dim"]]:
    """G of every layer, in nats: of the mean NLL of ``tokens[first:]``, each predicted from those before it.

    Args:
      nodes: gradients on the way.
      progress: called after each of them.
    """
    found = []
    for place, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        _, gradients = gradient(model, tokens, first, (place + 1) / 2)
        found.append([weight / 2 * one for one in gradients])
        progress()
    return [np.sum(layer, axis=0) for layer in zip(*found, strict=True)]


def gradient(
    model: Llama, tokens: Sequence[int], first: int, mixture: float
) -> tuple[float, list[Float[np.ndarray, "tokens kv_heads group head_dim"]]]:
    """L, and dL / do of every layer, at one g."""
    ids, g = jnp.asarray(tokens, jnp.int32), jnp.float32(mixture)
    config = model.config
    shape = len(tokens), config.kv_heads, config.heads // config.kv_heads, config.head_dim
    nothing = jnp.zeros(shape, jnp.float32)
    entering, x = [], model.embed(ids[None])
    for layer in model.layers:
        entering.append(x)
        x = mixed(layer, x, nothing, g)
    loss, dx = _loss(model, x, ids, first)
    found = []
    for layer, x in zip(list(model.layers)[::-1], entering[::-1], strict=True):
        dx, do = _back(layer, x, nothing, g, dx)
        found.append(np.asarray(do))
    return float(loss), found[::-1]


@jax.jit
def mixed(layer, x, change, g):
    """A layer whose heads' outputs are a mixture of everything and a window, plus a change."""
    tokens = x.shape[1]
    position = jnp.arange(tokens)
    q, k, v = (x[0].astype(jnp.float32) for x in layer.attention.project(layer.attention_norm(x), position[None]))
    logits = jnp.einsum("qhgd,khd->hgqk", q, k, precision="highest") * k.shape[-1] ** -0.5
    age = position[:, None] - position

    def read(visible):
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
        return jnp.einsum("hgqk,khd->qhgd", weights, v, precision="highest")

    near = (age < WINDOW) | (position < SINKS)
    output = g * read(age >= 0) + (1 - g) * read((age >= 0) & near) + change
    x = x + layer.attention.out(output.reshape(1, tokens, -1).astype(x.dtype))
    return x + layer.feed_forward(layer.feed_forward_norm(x))


@jax.jit
def _back(layer, x, change, g, dx):
    return jax.vjp(lambda x, change: mixed(layer, x, change, g), x, change)[1](dx)


@partial(jax.jit, static_argnames="first")
def _loss(model, x, tokens, first):
    @jax.checkpoint
    def nll(pair):
        x, following = pair
        return -jax.nn.log_softmax(model.logits(model.norm(x)))[following]

    def mean(x):
        return jax.lax.map(nll, (x[0, first - 1 : -1], tokens[first:]), batch_size=256).mean()

    return jax.value_and_grad(mean)(x)
