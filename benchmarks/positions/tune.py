"""Fine-tuning through a cache that evicts: gradients go through what each query saw, not through who was evicted.

Two copies of a model are trained on the same rows, one with CORM in its cache, one with the full cache. The second
tells what more training alone changes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import corm_jax as cj
from corm_jax.model.decoder import forward, make_caches
from positions import data, measure, train


class Tuning(NamedTuple):
    """How a model is fine-tuned: ``chunk`` tokens are read between two evictions."""

    steps: int = 100
    rows: int = 4
    rate: float = 3e-4
    chunk: int = 16
    window: int = 64


def loss(model: cj.Transformer, policy: cj.Policy, tokens: jax.Array, chunk: int) -> jax.Array:
    """The mean NLL of rows that are read through the caches of a policy."""
    rows, length = tokens.shape
    caches = make_caches(model, policy, batch=rows, capacity=length, tokens=length, chunk=chunk)
    x, _, _ = forward(model, policy, caches, tokens, jnp.full(rows, length, jnp.int32), chunk=chunk)
    return train.nll(model.logits(x), tokens).mean()


def tune(
    model: cj.Transformer,
    policy: cj.Policy,
    texts: list[np.ndarray],
    recipe: Tuning,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> cj.Transformer:
    """Trains a copy of the model on, with this policy in its caches."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(recipe.rate, b2=0.95, weight_decay=0.0))
    size = model.config

    @partial(jax.jit, donate_argnums=0)
    def update(carried: train.Trained, tokens: jax.Array) -> train.Trained:
        gradients = jax.grad(loss)(carried.model, policy, tokens, recipe.chunk)
        changes, state = optimizer.update(gradients, carried.state, carried.model)
        return train.Trained(optax.apply_updates(carried.model, changes), state)

    carried = train.Trained(jax.tree.map(jnp.copy, model), optimizer.init(model))
    for step in range(recipe.steps):
        tokens = data.batch(texts, 10**6 + seed, step, recipe.rows, size.context)
        carried = jax.block_until_ready(update(carried, tokens))
        progress(step + 1)
    return carried.model


def compared(
    model: cj.Transformer,
    texts: list[np.ndarray],
    held: np.ndarray,
    recipe: Tuning,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """What the model is before, after tuning with the full cache, and after tuning with CORM, on texts of others."""
    corm = measure.corm(recipe.window)
    models = {"before": model}
    for number, (name, policy) in enumerate({"full": cj.Full(), "corm": corm}.items()):
        models[name] = tune(
            model, policy, texts, recipe, seed, lambda step, done=number * recipe.steps: progress(done + step)
        )
    found: dict[str, Any] = {}
    for name, one in models.items():
        tests = {"text": held, "repeat": data.repeats(held, measure.PASSAGE)}
        read = {"full": cj.Full(), f"corm {recipe.window}": corm}
        found[name] = {
            test: [{policy: measure.read(one, rule, row, test) for policy, rule in read.items()} for row in rows]
            for test, rows in tests.items()
        }
    return found
