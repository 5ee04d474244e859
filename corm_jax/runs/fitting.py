"""The window with which CORM keeps a given number of keys, so that it can be compared with policies on a budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from corm_jax.core.arguments import Tokens, token_ids
from corm_jax.core.observation import Observation
from corm_jax.core.options import integer
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec, State
from corm_jax.core.wrapper import Wrapper, name_of
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, make_caches, windows_of
from corm_jax.model.generation import prefill
from corm_jax.policies import Corm, Notation, held_by, lacks_window, on_budget, parse, policy
from corm_jax.runs.perplexity import read_text

TOLERANCE = 0.02
"""The search ends if the keys that are kept differ from the goal by at most this share of it."""

PASSES = 4
"""The most times that the text is read with a window on trial."""


@policy
class WidestGap(Wrapper):
    """Evicts nothing, and records each key's longest gap: the most queries in a row that did not find it important.

    With w = r, CORM evicts a key as soon as t - max(last, position + 1) >= w, so a key stays if w is above its gap.
    The state is that of CORM, and the longest gap of each key.
    """

    @property
    def traits(self) -> Traits:
        return super().traits._replace(most=None)

    def init(self, spec: CacheSpec) -> State:
        return self.policy.init(spec), jnp.zeros(spec.slots, jnp.int32)

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        last, gap = state
        last = self.policy.observe(last, observation, slots)
        return last, jnp.maximum(gap, slots.seen - jnp.maximum(last, slots.position + 1))

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live

    def score(self, state: State, slots: Slots) -> Int[Array, "*slots"]:
        return slots.position


def fit_window(
    model: Decoder,
    tokens: Tokens,
    keys: SupportsIndex,
    corm: Policy,
    *,
    chunk: SupportsIndex = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """The w = r with which CORM has ``keys`` live keys a head, on average, when a text ends; or the nearest found.

    The mean is that of the global layers, since CORM does not decide about local ones.

    The text is first read with a full cache. That shows how many keys each window would keep if evictions did not
    change attention. They do, so the text is then read with the window found, up to `PASSES` times; each time the goal
    is corrected by the number of keys that were kept.

    Args:
      tokens: the text.
      keys: the goal, live keys of a head.
      corm: the policy, of which ``window`` and ``recent`` are replaced.
      chunk: tokens between two evictions.
      progress: called with the number of times that the text was read with a window.

    Raises:
      CormError: for a goal outside 1 to the number of tokens, a model without global layers, and as
        `corm_jax.runs.perplexity.read_text`.
    """
    if not isinstance(corm, Corm):
        raise CormError(f"a window can be searched for Corm, not for {name_of(corm)}")
    tokens, chunk, keys = token_ids(tokens, model.config.vocab), integer("chunk", chunk), integer("keys", keys)
    n = len(tokens)
    if not 1 <= keys <= n:
        raise CormError(f"a text of {n} tokens cannot end with {keys} live keys a head: choose from 1 to {n}")
    windows = windows_of(model.config)
    if None not in windows:
        raise CormError("the model has local layers only, in which CORM has no window to be searched: give it one")
    first = WidestGap(policy=dataclasses.replace(corm, window=1, recent=1))
    empty = make_caches(model, first, batch=1, capacity=max(n, chunk), tokens=n, chunk=chunk)
    _, caches = prefill(model, first, empty, [tokens], chunk=chunk)
    wide = [cache for cache, window in zip(caches, windows, strict=True) if window is None]
    gaps = np.stack([np.asarray(cache.state[1])[np.asarray(cache.position) >= 0] for cache in wide])
    heads, gaps = gaps.size // n, np.sort(gaps, axis=None)  # a key is live with every window above its gap
    found, goal = {}, float(keys)
    for done in range(PASSES):
        progress(done + 1)
        window = int(np.clip(gaps[min(int(goal * heads), gaps.size - 1)], 1, n))
        if window in found:
            break
        trial = dataclasses.replace(corm, window=window, recent=window)
        live = n * read_text(model, trial, tokens, chunk=chunk).usage.kept
        found[window] = abs(live / keys - 1)
        if found[window] <= TOLERANCE:
            break
        goal = float(np.clip(goal * keys / live, 1, n))
    return min(found, key=lambda window: found[window])


def fitted(
    spec: str,
    model: Decoder,
    tokens: Sequence[int],
    keys: int,
    *,
    chunk: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[str, str]:
    """A SPEC that keeps ``keys`` keys of a head, and how it does so.

    - ``"fixed"``: the policy gets a budget of ``keys``, and keeps that many.
    - ``"cap"``: the policy decides by itself, and gets a budget of ``keys`` as a limit.
    - ``"searched"``: CORM without a window of its own gets the window that `fit_window` finds.
    - ``"none"``: the full cache, which has no budget.
    """
    if lacks_window(spec):
        window = fit_window(model, tokens, keys, parse(spec), chunk=chunk, progress=progress)
        return str(Notation.read(spec).having(window=window, recent=window)), "searched"
    return on_budget(spec, keys), held_by(spec)
