"""Teacher-forced reading: how well a text is predicted through a policy's cache, and what the cache costs."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from corm_jax.core import cache
from corm_jax.core.arguments import Tokens, token_ids
from corm_jax.core.arrays import broadcasts
from corm_jax.core.capacity import slots_for
from corm_jax.core.options import integer, one_of
from corm_jax.core.prompt import check_prompt, prompt_of, set_prompt
from corm_jax.core.types import Capacity, Usage, global_layers
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, forward, make_caches, policies_of, windows_of
from corm_jax.model.generation import OVERFLOW, Blocks, Overflow, Policies, watch
from corm_jax.showing.brief import line, table
from corm_jax.showing.labelled import Variable, dataset

if TYPE_CHECKING:
    import xarray


class Reading(NamedTuple):
    """One text read through one policy's caches.

    Attributes:
      nll: float32 ``[tokens - 1]``, nats: -ln of the probability of each token after the first.
      live: int32 ``[layer, chunks, kv_heads]``, live keys after each chunk.
      seen: int32 ``[chunks]``, tokens read after each chunk.
      usage: how full the caches are at the end.
      passes: how many times the queries of a block attended until its evictions no longer changed, in the exact
        recurrence; mean over blocks and layers. With chunks it is 1.
      seconds: wall time, without compiling.
    """

    nll: np.ndarray
    live: np.ndarray
    seen: np.ndarray
    usage: Usage
    passes: float
    seconds: float

    @property
    def kept(self) -> np.ndarray:
        """The share of the keys that are live after each chunk, mean over the heads of global layers: ``[chunks]``.

        In a model without global layers, the mean over all heads.
        """
        return self.live[global_layers(self.usage.windows)].mean((0, 2)) / self.seen

    @property
    def kept_per_layer(self) -> np.ndarray:
        """The share of the keys that are live at the end, mean over the heads of each layer: ``[layer]``."""
        return self.live[:, -1].mean(-1) / self.seen[-1]

    def __repr__(self) -> str:
        return line("Reading", tokens=len(self.nll) + 1, **self._summary)

    def _repr_html_(self) -> str:
        nll, kept, _ = self._summary.values()
        rows = {"tokens": f"{len(self.nll) + 1:,}", "NLL, nats a token": nll, "keys live at the end, share": kept}
        return table("Reading", rows | self.usage.summary)

    @property
    def _summary(self) -> dict[str, object]:
        nll, kept = self.nll.mean(dtype=np.float64), self.kept[-1]
        return {"nll": f"{nll:.4f}", "kept": f"{kept:.3f}", "usage": self.usage}

    def to_xarray(self) -> "xarray.Dataset":
        """The reading with named axes: ``layer``, ``kv_head``, ``token``, and ``seen``, tokens read after each chunk.

        ``nll`` begins with the second token: the first is not predicted. Needs ``pip install 'corm-jax[xarray]'``.
        """
        live = Variable("layer seen kv_head", self.live, "live keys", "keys")
        nll = Variable("token", self.nll, "negative log-likelihood of the token", "nats")
        coords = {"seen": self.seen, "token": np.arange(1, len(self.nll) + 1)}
        sizes = {name: getattr(self.usage, name) for name in ("bytes_live", "bytes_allocated", "bytes_full")}
        return dataset({"nll": nll, "live": live}, coords=coords, attrs=sizes | {"passes": self.passes})


def read_text(
    model: Decoder,
    policy: Policies,
    tokens: Tokens,
    *,
    capacity: Capacity | None = None,
    stores: SupportsIndex | None = None,
    chunk: SupportsIndex = 1,
    prompt: SupportsIndex | None = None,
    overflow: Overflow = "evict",
    progress: Callable[[int], None] = lambda done: None,
) -> Reading:
    """Reads a text through the caches of a policy, and measures how well each token is predicted.

    Args:
      tokens: the ids of one text, a list or an array, at least two.
      capacity, stores: as in `corm_jax.generate`; by default there are as many slots as the policy can need.
      chunk: tokens between two evictions; 1 is the exact recurrence.
      prompt: how many of the tokens are the prompt, for policies that wait for its end. A chunk ends where it ends.
      overflow: as in `corm_jax.prefill`.
      progress: called with the number of tokens read so far.

    Raises:
      CormError: for fewer than 2 tokens, ids outside the vocabulary, a capacity that cannot hold a chunk, a ``prompt``
        that is missing or impossible, or predictions that are NaN or infinite.
    """
    tokens = token_ids(tokens, model.config.vocab)
    if len(tokens) < 2:
        raise CormError(f"a text of {len(tokens)} tokens has no token to predict: give at least 2 tokens")
    chunk = integer("chunk", chunk)
    one_of("overflow", overflow, OVERFLOW)
    policies = policies_of(model, policy)
    capacity = slots_for(policy, capacity, len(tokens), chunk, windows_of(model.config))
    how = {"stores": stores, "tokens": len(tokens), "chunk": chunk}
    check_prompt(policies, capacity, prompt := prompt_of(policy, prompt, len(tokens)))
    blocks, targets, counts = cut(tokens, prompt, model.config.vocab, chunk)
    caches = make_caches(model, policies, batch=1, capacity=capacity, **how)
    caches = set_prompt(policies, caches, np.array([len(tokens)], np.int32), np.array([prompt], np.int32), chunk)
    check = watch(caches, overflow)
    # A block without tokens changes nothing. It is read so that `seconds` does not count the compiling.
    _, _, caches = _score(model, policy, caches, blocks[:1], targets[:1], np.zeros(1, np.int32), chunk=chunk)
    jax.block_until_ready(caches)
    started, scores, live, passes, seen = time.perf_counter(), [], [], [], [0]
    for index, count in enumerate(counts):
        here = slice(index, index + 1)
        nll, course, caches = _score(model, policy, caches, blocks[here], targets[here], count, chunk=chunk)
        read_ = int(count[0])
        scores.append(np.asarray(nll[0, :read_]))
        live.append(np.asarray(course.live[:, 0, : -(-read_ // chunk)]))
        passes.append(np.asarray(course.passes[:, 0]).mean())
        check(caches)
        seen += [seen[-1] + min(done, read_) for done in range(chunk, read_ + chunk, chunk)]
        progress(seen[-1])
    seconds = time.perf_counter() - started
    nll = np.concatenate(scores)[: len(tokens) - 1]
    if not np.isfinite(nll).all():
        where = int(np.flatnonzero(~np.isfinite(nll))[0]) + 1
        raise CormError(
            f"the model's prediction of token {where} is NaN or infinite: are the weights sound in this dtype?"
        )
    usage, passed = cache.usage(caches), float(np.mean(passes))
    return Reading(nll, np.concatenate(live, axis=1), np.array(seen[1:]), usage, passed, seconds)


def cut(
    tokens: Tokens, prompt: int, vocab: int, chunk: int
) -> tuple[Int[np.ndarray, "blocks block"], Int[np.ndarray, "blocks block"], Int[np.ndarray, "blocks 1"]]:
    """Cuts a text into blocks.

    Prompt and rest are cut apart, so that the rest is read after the eviction that waits for the end of the prompt.

    Returns:
      The tokens of each block, padded; the token that follows each; and how many tokens of each block are no padding.
    """
    parts = [Blocks.cut([part], vocab, chunk) for part in (tokens[:prompt], tokens[prompt:]) if len(part)]
    blocks, counts = (np.concatenate(x) for x in zip(*((part.tokens[0], part.count) for part in parts), strict=True))
    targets, start = np.zeros_like(blocks), 0
    for row, (count,) in zip(targets, counts, strict=True):
        following = tokens[start + 1 : start + 1 + int(count)]
        row[: len(following)] = following
        start += int(count)
    return blocks, targets, counts


@partial(jax.jit, static_argnames="chunk", donate_argnames="caches")
@broadcasts
def _score(model, policy, caches, tokens, targets, count, *, chunk):
    x, caches, course = forward(model, policy, caches, tokens, count, chunk=chunk)
    log_probability = jax.nn.log_softmax(model.logits(x))
    return -jnp.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0], course, caches
