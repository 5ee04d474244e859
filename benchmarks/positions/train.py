"""Training: next-token loss, AdamW (optax), master weights in float32, checkpoints (orbax) from which a run goes on."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import corm_jax as cj
from corm_jax.core.layout import Apart
from corm_jax.model.decoder import Attend
from positions import data
from positions.models import build


class Recipe(NamedTuple):
    """How all models are trained: stages of (steps, rows, tokens a row, the only kind of rows), short rows first."""

    stages: tuple[tuple[int, int, int, str], ...] = ((2200, 8, 64, "noise"), (1000, 16, 64, ""), (900, 4, 512, ""))
    rate: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.1
    clip: float = 1.0

    @property
    def steps(self) -> int:
        """How many there are in all stages."""
        return sum(steps for steps, *_ in self.stages)

    def rows_of(self, step: int) -> tuple[int, int, str]:
        """The number of rows that a step reads, their length, and their only kind."""
        for steps, *rows in self.stages:
            if step < steps:
                return tuple(rows)
            step -= steps
        raise IndexError(step)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW under a learning rate that rises for ``warmup`` steps, stays, and falls to 0 in the last tenth."""
        warmup, decay = min(self.warmup, self.steps // 10), max(self.steps // 10, 1)
        parts = [optax.linear_schedule(0, self.rate, warmup), optax.linear_schedule(self.rate, 0, decay)]
        rate = optax.join_schedules(parts, [self.steps - decay])
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adamw(rate, b2=0.95, weight_decay=self.decay))


def dense(q: jax.Array, k: jax.Array, v: jax.Array, encoding: Any = None, **form: Any) -> jax.Array:
    """Attention without a cache: all queries of ``[batch, tokens, heads, head_dim]`` at once, for training."""
    if form:
        raise cj.CormError(f"attention of the form {form} is not trained")
    position = jnp.arange(q.shape[1], dtype=jnp.int32)
    if encoding is not None:
        q, k = (jax.vmap(encoding.rotate, (0, None))(x, position) for x in (q, k))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    distance = position[:, None] - position
    bias = None if encoding is None else encoding.bias(distance[:, None], Apart())
    if bias is not None:
        logits = logits + jnp.moveaxis(bias[0], 1, 0)  # one query head a key-value head
    weights = jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def logits_of(
    model: cj.Transformer, tokens: jax.Array, first: jax.Array | int = 0, attend: Attend = dense
) -> jax.Array:
    """Scores of the next token, ``[batch, tokens, vocab]``, with all keys. ``first`` is the position of a row's first.

    Only learned positions depend on it: `dense` counts from 0, since all other kinds know no more than distances.
    """
    counted = jnp.asarray(first, jnp.int32).reshape(-1, 1) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    position = jnp.broadcast_to(counted, tokens.shape)
    x = model.embed(tokens, position)
    for layer in model.layers:
        x = layer(x, position, attend)
    return model.logits(x)


def nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-ln of the probability of each token after the first, ``[batch, tokens - 1]``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


class Trained(NamedTuple):
    """What training carries from step to step, and what is written to disk."""

    model: cj.Transformer
    state: Any


def train(
    folder: Path,
    kind: str,
    size: dict[str, int],
    seed: int,
    recipe: Recipe,
    texts: list[np.ndarray],
    *,
    compute: str,
    watch: Callable[[cj.Transformer], dict[str, float]],
    progress: Callable[[int], None] = lambda step: None,
    every: int = 500,
) -> cj.Transformer:
    """Trains a model, or goes on with its training, or reads it if that is done.

    Every ``every`` steps, what is needed to go on is written to ``folder``, and a line with the loss and what ``watch``
    says of the model to ``folder/log.jsonl``.
    """
    optimizer = recipe.optimizer()
    model = build(kind, size, seed)
    carried = Trained(model, optimizer.init(model))
    like = jax.eval_shape(partial(build, kind, size, seed, jnp.dtype(compute)))

    @partial(jax.jit, donate_argnums=0)
    def update(carried: Trained, tokens: jax.Array, first: jax.Array) -> tuple[Trained, jax.Array]:
        def loss(model):
            narrow = cast(model, like)
            return nll(logits_of(narrow, tokens, first), tokens).mean()

        value, gradients = jax.value_and_grad(loss)(carried.model)
        changes, state = optimizer.update(gradients, carried.state, carried.model)
        return Trained(optax.apply_updates(carried.model, changes), state), value

    with _manager(folder) as manager:
        first = manager.latest_step() or 0
        if first:
            carried = _restored(manager, first, carried)
        started, losses = time.perf_counter(), []
        for step in range(first, recipe.steps):
            rows, length, only = recipe.rows_of(step)
            tokens = data.batch(texts, seed, step, rows, length, only)
            carried, value = update(carried, tokens, data.starts(seed, step, rows, length, size["context"], only))
            losses.append(value)
            progress(step + 1)
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                line = {"step": step + 1, "loss": float(np.mean(losses)), "seconds": time.perf_counter() - started}
                line |= watch(carried.model)
                manager.save(step + 1, args=ocp.args.StandardSave(jax.tree.leaves(carried)))
                manager.wait_until_finished()
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                started, losses = time.perf_counter(), []
    return carried.model


def load(folder: Path, kind: str, size: dict[str, int], recipe: Recipe) -> cj.Transformer:
    """The model of a training that is done.

    Raises:
      CormError: if it is not.
    """
    model = build(kind, size, 0)
    with _manager(folder) as manager:
        if (step := manager.latest_step()) != recipe.steps:
            raise cj.CormError(f"{folder}: step {step or 0} of {recipe.steps}: train it to its end first")
        return _restored(manager, step, Trained(model, recipe.optimizer().init(model))).model


def cast(model: cj.Transformer, like: cj.Transformer) -> cj.Transformer:
    """The same weights in the dtypes of another model of the same shape."""
    leaves, tree = jax.tree.flatten(like)
    return tree.unflatten([x.astype(one.dtype) for x, one in zip(jax.tree.leaves(model), leaves, strict=True)])


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder.absolute() / "steps", options=ocp.CheckpointManagerOptions(max_to_keep=1))


def _restored(manager: ocp.CheckpointManager, step: int, like: Trained) -> Trained:
    leaves, tree = jax.tree.flatten(like)
    return tree.unflatten(manager.restore(step, args=ocp.args.StandardRestore(leaves)))
