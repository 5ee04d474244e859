"""Answers to a prompt under a policy: the answer that the model generates, and the likelihood of the right one."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.cache import usage
from corm_jax.core.capacity import slots_for
from corm_jax.core.policy import Policy
from corm_jax.core.types import Caches, Usage
from corm_jax.model.decoder import Decoder, forward, make_caches, windows_of
from corm_jax.model.generation import STRETCH, decode, prefill

ANSWER = 32
"""Tokens of an answer that the model reads at once, rounded up to a multiple of the chunk."""


class Asked(NamedTuple):
    """A prompt that has been read.

    Attributes:
      logits: of the next token, ``[1, vocab]``.
      caches: the caches after the prompt.
      usage: how full they are.
    """

    logits: jax.Array
    caches: Caches
    usage: Usage


def ask(
    model: Decoder,
    policy: Policy,
    prompt: Sequence[int],
    tokens: int,
    chunk: int,
    *,
    largest: Policy | None = None,
) -> Asked:
    """Reads a prompt.

    Args:
      tokens: of the prompt and the longest answer, at most.
      chunk: tokens between evictions.
      largest: the policy whose keys the caches have room for; by default that of the reading. So prompts with different
        budgets share a compiled program.
    """
    capacity = slots_for(largest or policy, None, tokens, chunk, windows_of(model.config))
    caches = make_caches(model, policy, batch=1, capacity=capacity, tokens=tokens, chunk=chunk)
    logits, caches = prefill(model, policy, caches, [prompt], chunk=chunk)
    return Asked(logits, caches, usage(caches))


def answer_nll(model: Decoder, policy: Policy, asked: Asked, answer: Sequence[int], chunk: int) -> float:
    """Nats a token of an answer that is given to the model (teacher forcing), evicting after each chunk."""
    logits, caches, total = asked.logits, jax.tree.map(jnp.copy, asked.caches), 0.0
    size = -(-ANSWER // chunk) * chunk
    for start in range(0, len(answer), size):
        part = np.zeros((1, size), np.int32)
        count = len(answer[start : start + size])
        part[0, :count] = answer[start : start + size]
        counts = np.full(1, count, np.int32)
        nll, logits, caches = _forced(model, policy, caches, logits, part, counts, chunk=chunk)
        total += float(np.asarray(nll, np.float64)[:count].sum())
    return total / len(answer)


@partial(jax.jit, static_argnames="chunk", donate_argnames="caches")
def _forced(model, policy, caches, logits, tokens, count, *, chunk):
    x, caches, _ = forward(model, policy, caches, tokens, count, chunk=chunk)
    predicted = model.logits(x)[0]
    before = jnp.concatenate([logits, predicted[:-1]])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(before), tokens[0][:, None], axis=-1)[:, 0]
    return nll, predicted[count - 1], caches


def answer(
    model: Decoder, policy: Policy, asked: Asked, new_tokens: int, end: Sequence[int]
) -> tuple[list[int], Usage]:
    """The most likely continuation, token by token, and how full the caches are after it."""
    logits, caches, done = asked.logits, jax.tree.map(jnp.copy, asked.caches), jnp.zeros(1, bool)
    found: list[int] = []
    for start in range(0, new_tokens, STRETCH):
        numbers = np.int32(new_tokens - start), np.asarray(end, np.int32), np.float32(0), np.float32(1)
        tokens, logits, done, caches = decode(
            model, policy, caches, logits, jax.random.key(0), done, *numbers, steps=STRETCH
        )
        found += [int(token) for token in np.asarray(tokens[0]) if token >= 0 and token not in end]
        if bool(done.all()):
            break
    return found, usage(caches)
