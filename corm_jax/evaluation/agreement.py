"""Agreement of a policy with the full cache, token by token: NLL, KL divergence, the same most likely token."""

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
from corm_jax.core.prompt import prompt_of, set_prompt
from corm_jax.core.types import Caches, Usage
from corm_jax.model.decoder import Decoder, forward, make_caches, policies_of, windows_of
from corm_jax.policies import Full
from corm_jax.runs.perplexity import cut


class Agreement(NamedTuple):
    """Measures of each token that follows the prompt.

    Attributes:
      nll, full_nll: nats, with the policy and with the full cache.
      kl: KL(full || policy) over the vocabulary, nats.
      same: whether the most likely token is the same with both.
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
    """The predictions for a block of a text, made with a policy's caches.

    Attributes:
      log_probability: float32 ``[tokens, vocab]``, of the next token.
      live: int32 ``[layer, chunks, kv_heads]``, live keys after each chunk.
      caches: the caches after the block.
    """

    log_probability: Float[Array, "tokens vocab"]
    live: Int[Array, "layer chunks kv_heads"]
    caches: Caches


def measure(
    model: Decoder,
    policy: Policy,
    tokens: Sequence[int],
    prompt: int | None,
    chunk: int,
    *,
    full: Iterable[Array | np.ndarray] | None = None,
) -> Agreement:
    """Reads a text with a policy's caches and with the full cache, side by side unless ``full`` is given.

    Args:
      prompt: how many tokens are read first and not scored. If None, all tokens after the first are scored.
      full: the log probabilities of `blocks` with the full cache, for the same text, prompt and chunk, so that several
        policies can share them.

    Raises:
      CormError: for a prompt that is not part of the text, or no prompt for a policy that waits for its end.
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
    """Reads a text with a policy's caches. The caches of a block are valid until the next block is read."""
    prompt = prompt_of(policy, prompt, len(tokens))
    parts, _, counts = cut(tokens, prompt, model.config.vocab, chunk)
    capacity = slots_for(policy, None, len(tokens), chunk, windows_of(model.config))
    caches = make_caches(model, policy, batch=1, capacity=capacity, tokens=len(tokens), chunk=chunk)
    caches = set_prompt(
        policies_of(model, policy), caches, np.array([len(tokens)], np.int32), np.array([prompt], np.int32), chunk
    )
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
    """NLL by both, KL(p || q), and whether the most likely token is the same."""
    nll, full_nll = (-jnp.take_along_axis(x, target[:, None], axis=-1)[:, 0] for x in (log_q, log_p))
    return nll, full_nll, (jnp.exp(log_p) * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)
