"""How close a policy stays to the full cache, token by token: NLL, KL divergence, the same likeliest token."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from corm_jax.core.cache import usage
from corm_jax.core.capacity import slots_for
from corm_jax.core.policy import Policy
from corm_jax.core.prompt import expect, prompt_of
from corm_jax.core.types import Caches, Usage
from corm_jax.model.decoder import Decoder, forward, make_caches
from corm_jax.policies import Full
from corm_jax.runs.perplexity import cut


class Agreement(NamedTuple):
    """Of each token that follows the prompt.

    Attributes:
      nll, full_nll: nats, with the policy and with the full cache.
      kl: KL(full || policy) over the vocabulary, nats.
      same: whether both find the same token likeliest.
      live: int32 ``[layer, chunks, kv_heads]``, the policy's live keys after each chunk.
      usage: the policy's caches at the end.
    """

    nll: np.ndarray
    full_nll: np.ndarray
    kl: np.ndarray
    same: np.ndarray
    live: np.ndarray
    usage: Usage


class Block(NamedTuple):
    """What a block of a text is followed by, as predicted through a policy's caches.

    Attributes:
      log_probability: float32 ``[tokens, vocab]``.
      live: int32 ``[layer, chunks, kv_heads]``, live keys after each chunk.
      caches: after the block.
    """

    log_probability: Float[Array, "tokens vocab"]
    live: Int[Array, "layer chunks kv_heads"]
    caches: Caches


def compare(
    model: Decoder,
    policy: Policy,
    tokens: Sequence[int],
    prompt: int | None,
    chunk: int,
    *,
    full: Iterable[Array | np.ndarray] | None = None,
) -> Agreement:
    """Reads a text through a policy's cache and the full one, side by side unless ``full`` is given.

    Args:
      prompt: so many tokens are read first, and not scored. None scores all after the first one.
      full: the log probabilities of `blocks` with the full cache, of the same text, prompt and chunk: kept for
        several policies.

    Raises:
      CormError: for a prompt that is no part of the text, or none for a policy that waits for its end.
    """
    _, targets, counts = cut(tokens, prompt_of(policy, prompt, len(tokens)), model.config.vocab, chunk)
    if full is None:
        full = (block.log_probability for block in blocks(model, Full(), tokens, prompt, chunk))
    rows, live = [], []
    caches: Any = None
    for log_p, block, target, (count,) in zip(
        full, blocks(model, policy, tokens, prompt, chunk), targets, counts, strict=True
    ):
        rows.append([np.asarray(column)[:count] for column in _differ(log_p, block.log_probability, target)])
        live.append(np.asarray(block.live[:, : -(-int(count) // chunk)]))
        caches = block.caches
    scored = slice((prompt or 1) - 1, len(tokens) - 1)
    nll, full_nll, kl, same = (np.concatenate(x)[scored] for x in zip(*rows, strict=True))
    return Agreement(nll, full_nll, kl, same, np.concatenate(live, axis=1), usage(caches))


def blocks(model: Decoder, policy: Policy, tokens: Sequence[int], prompt: int | None, chunk: int) -> Iterator[Block]:
    """Reads a text through a policy's caches. Each block's caches are given up to the next."""
    prompt = prompt_of(policy, prompt, len(tokens))
    parts, _, counts = cut(tokens, prompt, model.config.vocab, chunk)
    capacity = slots_for(policy, None, len(tokens), chunk)
    caches = make_caches(model, policy, batch=1, capacity=capacity, tokens=len(tokens))
    caches = expect(policy, caches, np.array([len(tokens)], np.int32), np.array([prompt], np.int32), chunk)
    for part, count in zip(parts, counts, strict=True):
        block = Block(*_read(model, policy, caches, part[None], count, chunk=chunk))
        yield block
        caches = block.caches


@partial(jax.jit, static_argnames="chunk", donate_argnames="caches")
def _read(model, policy, caches, tokens, count, *, chunk):
    x, caches, course = forward(model, policy, caches, tokens, count, chunk=chunk)
    return jax.nn.log_softmax(model.logits(x)[0]), course.live[:, 0], caches


@jax.jit
def _differ(log_p, log_q, target):
    """NLL by both, KL(p || q), and whether the likeliest token is the same."""
    nll, full_nll = (-jnp.take_along_axis(x, target[:, None], axis=-1)[:, 0] for x in (log_q, log_p))
    return nll, full_nll, (jnp.exp(log_p) * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)
