"""How much a model's prediction loses when the outputs of its heads change, because keys are evicted.

Let ``o[t, h]`` be the output of key-value head h at token t (of all query heads of its group). Two answers are given,
and both are gradients with respect to it.

**The worth of outputs** (`worth`) is for changes that lose information. Let every output be a mixture: ``g`` times the
output over all keys, plus ``1 - g`` times the output over the first `SINKS` and the newest `WINDOW` keys alone. L(g) is
the mean negative log-likelihood of some tokens under this mixture. Its gradient is averaged from g = 0 to g = 1:

    G[t, h]  =  integral over g from 0 to 1 of  dL / do[t, h]          L changes by about  sum over t, h of  G . change

These are integrated gradients (Sundararajan et al., arXiv 1703.01365). The gradient at g = 1 alone would be near zero
for each of two heads that can replace each other, although one of them is needed. The integral is a Gauss-Legendre sum.

**The scores of outputs** (`scores`) are for small changes. Where a text is predicted well, the gradient of its
likelihood is noise around zero, and the loss is of second order. Let y be tokens that are drawn from the predictions:

    s[t, h]  =  d ln p(y) / do[t, h]          KL(before || after)  is about  E sum over t, h of  (s . change)^2 / 2

with the diagonal of the Fisher information. The scores of different tokens are uncorrelated, so that one draw is an
unbiased estimate.

In a local layer nothing is mixed: its heads read what the window shows.

One layer is run at a time, forward and backward, and one block of queries at a time, so that memory holds the attention
of a single block.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from corm_jax.core.arrays import broadcasts, iota
from corm_jax.core.form import Form
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, windows_of

SINKS, WINDOW = 4, 128
"""First and newest keys that a query reads at g = 0."""

QUERIES_PER_BLOCK = 512
"""Queries whose attention is in memory at one time."""


def worth(
    model: Decoder,
    tokens: Sequence[int],
    first: int,
    nodes: int,
    *,
    progress: Callable[[], None] = lambda: None,
) -> list[Float[np.ndarray, "tokens kv_heads group head_dim"]]:
    """G of every layer, in nats, for the mean NLL of ``tokens[first:]``, each predicted from the tokens before it.

    Args:
      nodes: at how many values of g the gradient is taken.
      progress: called after each gradient.
    """
    found = []
    for place, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        _, gradients = gradient(model, tokens, first, (place + 1) / 2)
        found.append([weight / 2 * one for one in gradients])
        progress()
    return [np.sum(layer, axis=0) for layer in zip(*found, strict=True)]


def gradient(
    model: Decoder, tokens: Sequence[int], first: int, mixture: int | float
) -> tuple[float, list[Float[np.ndarray, "tokens kv_heads group head_dim"]]]:
    """L and dL / do of every layer, at ``mixture`` = g."""
    entering, x = _forward(model, tokens, mixture)
    loss, dx = _loss(model, x[:, first - 1 : -1], jnp.asarray(tokens[first:], jnp.int32))
    dx = jnp.zeros_like(x).at[:, first - 1 : -1].set(dx)
    count = len(tokens) - first
    return float(loss) / count, [one / count for one in _backward(model, entering, dx, mixture)]


def scores(
    model: Decoder, tokens: Sequence[int], seed: int
) -> list[Float[np.ndarray, "tokens kv_heads group head_dim"]]:
    """The scores s of every layer, in nats, with the full cache; ``seed`` determines the tokens that are drawn."""
    entering, x = _forward(model, tokens, 1.0)
    _, dx = _loss(model, x, _draw(model, x, jax.random.key(seed)))
    return _backward(model, entering, dx, 1.0)


def _forward(model, tokens, mixture):
    """The hidden states that enter each layer, and those that leave the last layer."""
    ids = jnp.asarray(tokens, jnp.int32)[None]
    entering, x = [], model.embed(ids, iota(len(tokens))[None])
    for layer, window in zip(model.layers, windows_of(model.config), strict=True):
        entering.append(x)
        x = mixed(layer, x, _no_change(model, x), jnp.float32(mixture), window=window)
    return entering, x


def _backward(model, entering, dx, mixture):
    """The gradient with respect to the outputs of each layer's heads."""
    found, each = [], zip(model.layers, windows_of(model.config), entering, strict=True)
    for layer, window, x in list(each)[::-1]:
        dx, do = _back(layer, x, _no_change(model, x), jnp.float32(mixture), dx, window=window)
        found.append(np.asarray(do))
    return found[::-1]


def _no_change(model, x):
    config = model.config
    return jnp.zeros((x.shape[1], config.kv_heads, config.heads // config.kv_heads, config.head_dim), jnp.float32)


@partial(jax.jit, static_argnames="window")
@broadcasts
def mixed(layer, x, change, g, *, window=None):
    """A layer in which the outputs of the heads are the mixture for ``g``, plus ``change``.

    In a local layer, they are what the heads read in their ``window``, plus ``change``.
    """
    tokens = x.shape[1]
    position = iota(tokens)

    @jax.checkpoint
    def read(q, k, v, age, visible):
        logits = jnp.einsum("qhgd,khd->hgqk", q, k, precision="highest") * k.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where((age >= 0) & visible, logits, -jnp.inf))
        return jnp.einsum("hgqk,khd->qhgd", weights, v, precision="highest")

    def attend(q, k, v, encoding=None, **how):
        form = Form(encoding, **how)
        if beyond := [name for name in form.beyond if window is None or name != "window"]:
            raise CormError(
                f"a layer attends with a {beyond[0]}: only softmax(q . k) over all earlier keys can be measured"
            )
        q, k = (form.encoded(one[0], position) for one in (q, k))
        q, k, v = (one.astype(jnp.float32) for one in (form.queries(q).reshape(change.shape), k, v[0]))
        blocks = []
        for start in range(0, tokens, QUERIES_PER_BLOCK):
            some, end = slice(start, start + QUERIES_PER_BLOCK), min(start + QUERIES_PER_BLOCK, tokens)
            age = position[some, None] - position[:end]
            if window is not None:
                near = slice(max(start - window + 1, 0), end)
                blocks.append(read(q[some], k[near], v[near], age[:, near], age[:, near] < window))
                continue
            near = np.r_[: min(SINKS, max(start - WINDOW, 0)), max(start - WINDOW, 0) : end]
            kept = (age[:, near] < WINDOW) | (near < SINKS)
            everything = read(q[some], k[:end], v[:end], age, True)
            newest = read(q[some], k[near], v[near], age[:, near], kept)
            blocks.append(g * everything + (1 - g) * newest)
        output = jnp.concatenate(blocks) + change
        return output.reshape(1, tokens, -1, output.shape[-1]).astype(x.dtype)

    return layer(x, position[None], attend)


@partial(jax.jit, static_argnames="window")
def _back(layer, x, change, g, dx, *, window=None):
    return jax.vjp(lambda x, change: mixed(layer, x, change, g, window=window), x, change)[1](dx)


@jax.jit
def _loss(model, x, targets):
    """The summed negative log-likelihood of the targets, and its gradient."""

    @jax.checkpoint
    def nll(pair):
        x, target = pair
        return -jax.nn.log_softmax(model.logits(x))[target]

    return jax.value_and_grad(lambda x: jax.lax.map(nll, (x[0], targets), batch_size=256).sum())(x)


@jax.jit
def _draw(model, x, key):
    def draw(pair):
        x, key = pair
        return jax.random.categorical(key, model.logits(x))

    return jax.lax.map(draw, (x[0], jax.random.split(key, x.shape[1])), batch_size=256)
