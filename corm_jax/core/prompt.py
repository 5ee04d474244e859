"""Where a prompt begins and ends, for policies that evict at its end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.cache import clock_of
from corm_jax.core.capacity import check_slots, per_layer, several
from corm_jax.core.exact import planned
from corm_jax.core.options import concrete, integer, numbers_of, shown
from corm_jax.core.policy import Policy
from corm_jax.core.types import Caches, Capacity, Clock, LayerCache
from corm_jax.core.wrapper import name_of
from corm_jax.errors import CormError

WHOLE = "the whole prompt, which the policy keeps until it has been read"


def begin_prompt(cache: Any, tokens: Any) -> Any:
    """Declares that the next ``tokens`` tokens are a prompt. A policy that waits for its end evicts there.

    It is for models of your own, which call `corm_jax.step`: for the models of this package `corm_jax.prefill` does it.
    The prompt may be read in any number of steps; keys are evicted after the step in which it ends.

    Returns the cache with another clock.

    Args:
      cache: a `LayerCache`, or the `Caches` of a model.
      tokens: how many, a whole number from 1 up; for a batch also ``[batch]``. May be traced.

    Raises:
      CormError: for another number, or an array with another number of rows than the cache.

    >>> from corm_jax import CacheSpec, SnapKV, make_cache
    >>> cache = make_cache(SnapKV(budget=4, window=2), CacheSpec(kv_heads=1, capacity=16, head_dim=8))
    >>> int(begin_prompt(cache, 12).clock.prompt)
    12
    """
    clock = _clock_in(cache, "begin_prompt")
    found = numbers_of(tokens)
    if found is None or not jnp.issubdtype(found.dtype, jnp.integer) or (concrete(found) and np.any(found < 1)):
        raise CormError(f"a prompt must have a whole number of tokens from 1 up, not {shown(tokens)}")
    if concrete(found) and np.any(found > ENDLESS):
        raise CormError(f"a prompt can have up to {ENDLESS} tokens, not {shown(tokens)}")
    if found.shape not in ((), clock.seen.shape):
        rows = f"{clock.seen.size} rows" if clock.seen.ndim else "one sequence"
        raise CormError(f"tokens has the shape {found.shape} for a cache of {rows}: give one number, or one a row")
    prompt = clock.seen + jnp.minimum(jnp.asarray(found, jnp.int32), ENDLESS - clock.seen)
    return _with(cache, replace(clock, prompt=prompt, stage="reading"))


def end_prompt(cache: Any) -> Any:
    """Declares that the prompt has been read, in all rows of a batch. Returns the `LayerCache` or the `Caches`.

    It only makes the following steps cheaper: they are compiled without the eviction at the end of a prompt.
    `begin_prompt` begins another prompt.
    """
    clock = replace(_clock_in(cache, "end_prompt"), stage="read")
    return _with(cache, clock, roomy=False, block=None, moments=None)


def _clock_in(cache: Any, what: str) -> Clock:
    if isinstance(cache, LayerCache):
        return clock_of(cache)
    if not isinstance(cache, Caches):
        raise CormError(f"{what} takes a LayerCache, or the Caches of a model, not {type(cache).__name__}")
    return cache.clock


def _with(cache: Any, clock: Clock, **made: Any) -> Any:
    """The cache, or the caches, with this clock, and with these fields of `Made` replaced."""
    if isinstance(cache, Caches):
        return Caches(tuple(_with(one, clock, **made)._replace(clock=None) for one in cache.layers), clock)
    return cache._replace(clock=clock, made=cache.made and replace(cache.made, **made))


def set_prompt(
    policy: Policy | Sequence[Policy], caches: Caches, tokens: Int[np.ndarray, " batch"], prompt: Any, chunk: int
) -> Caches:
    """The caches of a model that will read ``tokens`` tokens, of which the first ``prompt`` are a prompt.

    Since the numbers are known here, the programs of the exact recurrence leave out what cannot happen. Programs that
    read in chunks are the same for all numbers.
    """
    end = np.asarray(caches.clock.seen).astype(np.int64) + tokens
    caches = begin_prompt(caches, prompt)
    if chunk > 1:
        return _with(caches, caches.clock, roomy=False, block=None, moments=None)

    def one(policy: Policy, cache: LayerCache) -> LayerCache:
        slots = cache.position.shape[-2] * cache.position.shape[-1]
        roomy, (block, moments) = bool(np.max(end) * cache.overflow.shape[-1] <= slots), planned(policy)
        return cache._replace(made=cache.made and replace(cache.made, roomy=roomy, block=block, moments=moments))

    return Caches.of(map(one, per_layer(policy, len(caches)), caches))


def whole_prompt(policy: Policy | Sequence[Policy]) -> bool:
    """Whether the policy of some layer keeps every key until the prompt has been read."""
    return any(one.traits.whole_prompt for one in several(policy))


def prompt_of(policy: Policy | Sequence[Policy], prompt: SupportsIndex | None, tokens: int) -> int:
    """How many of a text's tokens are the prompt; `ENDLESS` for None, if the policy does not need to know.

    Raises:
      CormError: for a prompt longer than the text, or None for a policy that waits for the end of the prompt.
    """
    if prompt is None:
        for one in several(policy):
            if one.traits.whole_prompt:
                raise CormError(
                    f"{name_of(one)} waits for the end of the prompt: say how many of the tokens are the prompt, "
                    "with prompt=... or --prompt"
                )
        return ENDLESS
    prompt = integer("prompt", prompt)
    if prompt > tokens:
        raise CormError(f"a prompt of {prompt} tokens does not end within a text of {tokens}: say fewer")
    return prompt


def check_prompt(policy: Policy | Sequence[Policy], capacity: Capacity, tokens: int) -> None:
    """Raises unless there are slots for a prompt, in all layers whose policy keeps all of it."""
    needs = [tokens if one.traits.whole_prompt else 0 for one in several(policy)]
    each = np.ndim(capacity) == 1 and len(needs) == len(capacity)  # pyright: ignore
    check_slots(capacity, needs if each else max(needs), WHOLE)


def check_clock(caches: Caches, tokens: Int[np.ndarray, " batch"]) -> None:
    """Raises if so many tokens more would pass the end of a row's clock, `ENDLESS`: positions are int32."""
    end = int((np.asarray(caches.clock.seen).astype(np.int64) + tokens).max())
    if end > ENDLESS:
        raise CormError(f"the clock of a cache ends at {ENDLESS} tokens, not {end}: go on in an empty cache")
