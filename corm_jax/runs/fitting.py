"""CORM to a given size: the window with which it keeps as many keys as a budget would."""

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
from corm_jax.model.decoder import Decoder, make_caches
from corm_jax.model.generation import prefill
from corm_jax.policies import Corm, Notation, held_by, lacks_window, on_budget, parse, policy
from corm_jax.runs.perplexity import read_text

TOLERANCE = 0.02
"""How near to the goal is near enough."""

PASSES = 4
"""With the policy at work, at most."""


@policy
class WidestGap(Wrapper):
    """Evicts nothing, and notes for each key the longest time that nobody found it important.

    The state is what CORM remembers, and the longest gap: with w = r, a key goes when t - max(last, position + 1) >= w.
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
    """The w = r with which CORM ends a text with a mean of ``keys`` live keys a head, or as near as it comes.

    A first pass with a full cache tells how many each window would keep if evictions changed nothing. They change
    something: a few more passes, with the policy at work, correct the goal by what it then really keeps.

    Args:
      tokens: the text.
      keys: the goal, as a budget would set it.
      corm: the policy; its window and recent keys do not matter.
      chunk: tokens between evictions.
      progress: called with the number of passes done.

    Raises:
      CormError: for a goal outside 1 to the number of tokens, and as `corm_jax.runs.perplexity.read_text`.
    """
    if not isinstance(corm, Corm):
        raise CormError(f"a window can be searched for Corm, not for {name_of(corm)}")
    tokens, chunk, keys = token_ids(tokens, model.config.vocab), integer("chunk", chunk), integer("keys", keys)
    n = len(tokens)
    if not 1 <= keys <= n:
        raise CormError(f"a text of {n} tokens cannot end with {keys} live keys a head: choose from 1 to {n}")
    first = WidestGap(policy=dataclasses.replace(corm, window=1, recent=1))
    empty = make_caches(model, first, batch=1, capacity=max(n, chunk), tokens=n)
    _, caches = prefill(model, first, empty, [tokens], chunk=chunk)
    gaps = np.stack([np.asarray(cache.state[1])[np.asarray(cache.position) >= 0] for cache in caches])
    heads, gaps = gaps.size // n, np.sort(gaps, axis=None)  # a key is live with every window above its gap
    found, goal = {}, float(keys)
    for done in range(PASSES):
        progress(done + 1)
        window = int(np.clip(gaps[min(int(goal * heads), gaps.size - 1)], 1, n))
        if window in found:
            break
        trial = dataclasses.replace(corm, window=window, recent=window)
        live = float(read_text(model, trial, tokens, chunk=chunk).usage.live.mean())
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
    """A SPEC at a given size, and how it comes to have it.

    ``fixed``: the policy has a budget of ``keys``. ``cap``: it decides by itself, up to as many. ``searched``: CORM
    without a window of its own gets the one that `fit_window` finds. The full cache stays as it is: ``none``.
    """
    if lacks_window(spec):
        window = fit_window(model, tokens, keys, parse(spec), chunk=chunk, progress=progress)
        return str(Notation.read(spec).having(window=window, recent=window)), "searched"
    return on_budget(spec, keys), held_by(spec)
