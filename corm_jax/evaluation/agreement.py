"""How close a policy stays to the full cache, token by token: NLL, KL divergence, the same likeliest token."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.cache import expect, slots_for, usage
from corm_jax.model import Llama
from corm_jax.perplexity import cut
from corm_jax.policies import Full
from corm_jax.types import Caches, Policy, Usage


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


def compare(model: Llama, policy: Policy, tokens: Sequence[int], prompt: int, chunk: int) -> Agreement:
    """Reads a text through a policy's cache and the full one side by side, so that no prediction has to be kept.

    Args:
      prompt: so many tokens are read first, and not scored; with 0 all are, after the first.
    """
    blocks, targets, counts = cut(tokens, prompt, model.config.vocab, chunk)

    def empty(policy: Policy) -> Caches:
        caches = model.make_caches(policy, batch=1, capacity=slots_for(policy, None, len(tokens), chunk))
        return expect(caches, np.array([prompt], np.int32))

    caches, full, rows, live = empty(policy), empty(Full()), [], []
    for index, count in enumerate(counts):
        here = blocks[index : index + 1], targets[index : index + 1], count
        row, here_live, caches, full = _both(model, policy, caches, full, *here, chunk=chunk)
        rows.append([np.asarray(column)[: int(count[0])] for column in row])
        live.append(np.asarray(here_live[:, 0, : -(-int(count[0]) // chunk)]))
    scored = slice(max(prompt, 1) - 1, len(tokens) - 1)
    nll, full_nll, kl, same = (np.concatenate(x)[scored] for x in zip(*rows, strict=True))
    return Agreement(nll, full_nll, kl, same, np.concatenate(live, axis=1), usage(caches))


@partial(jax.jit, static_argnames="chunk", donate_argnames=("caches", "full_caches"))
def _both(model, policy, caches, full_caches, tokens, targets, count, *, chunk):
    def read(policy, caches):
        x, caches, live = model(policy, caches, tokens, count, chunk=chunk)
        log_probability = jax.nn.log_softmax(model.logits(x)[0])
        nll = -jnp.take_along_axis(log_probability, targets[0][:, None], axis=-1)[:, 0]
        return nll, log_probability, live, caches

    full_nll, log_p, _, full_caches = read(Full(), full_caches)
    nll, log_q, live, caches = read(policy, caches)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return (nll, full_nll, kl, log_p.argmax(-1) == log_q.argmax(-1)), live, caches, full_caches
