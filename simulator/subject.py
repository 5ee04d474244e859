"""A policy in a cache, as the conformance suite runs it: short histories of one layer, read piece by piece."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from corm_jax.core.arrays import ENDLESS, iota
from corm_jax.core.cache import make_cache
from corm_jax.core.prompt import begin_prompt
from corm_jax.core.step import step
from corm_jax.core.types import CacheSpec, LayerCache
from corm_jax.policies import oneshot
from simulator.held import by_head
from simulator.specification import Reference
from simulator.strategies import CHUNK, KV_HEADS, TOKENS, Case, cases


class Implementation(NamedTuple):
    """A cache to be tested: `corm_jax.make_cache` and `corm_jax.step`, or functions that do the same.

    The heads of a layer share as many sets of slots as ``stores``; None if each has its own.
    """

    make_cache: Callable = make_cache
    step: Callable = step
    stores: int | None = None


class History(NamedTuple):
    """The contents of a cache after each step.

    Attributes:
      position: int32 ``[steps, kv_heads, slots]``; in a pool `EMPTY` where another head owns the slot.
      overflow: int32 ``[steps, kv_heads]``.
      outputs: float32 ``[steps, CHUNK, kv_heads, group, head_dim]``, zero for padding.
      cache: the final one.
    """

    position: jax.Array
    overflow: jax.Array
    outputs: jax.Array
    cache: LayerCache

    @property
    def kept(self) -> np.ndarray:
        """Bool ``[1, kv_heads, steps, keys]``, see `simulator.invariants`."""
        held = np.asarray(self.position)[..., None] == np.arange(TOKENS + CHUNK)
        return held.any(-2).transpose(1, 0, 2)[None]


class Subject(NamedTuple):
    """The subject of a check: a policy, the cache in which it is tried, and its specification or None."""

    policy: Any
    implementation: Implementation
    reference: Reference | None

    def draw(self, data: st.DataObject, counts: Sequence[int] | None = None) -> Case:
        """A case. Logits of heads that share slots differ a little, since ties would depend on the order of slots."""
        case = data.draw(cases(counts=counts))
        factor = 1 + np.arange(KV_HEADS, dtype=np.float32)[:, None, None, None] / 16
        return dataclasses.replace(case, logits=case.logits * factor) if self.shares else case

    @property
    def shares(self) -> bool:
        """Whether heads share slots."""
        return self.implementation.stores not in (None, KV_HEADS)

    @property
    def few(self) -> int:
        """A capacity for half of the tokens, or for the keys that the policy never evicts."""
        return max(TOKENS // 2, int(np.max(self.policy.traits.protected)) + CHUNK)

    def cache(self, capacity: int | None = None, prompt: int | np.ndarray = ENDLESS, **batch: int) -> LayerCache:
        """An empty cache; without a capacity, one in which nothing overflows."""
        enough = max(TOKENS + CHUNK, int(np.max(self.policy.traits.protected)))
        shape = CacheSpec(KV_HEADS, capacity or enough, TOKENS, stores=self.implementation.stores)
        return begin_prompt(_empty(self.implementation.make_cache, self.policy, shape, **batch), prompt)

    def read(self, case: Case, capacity: int | None = None) -> History:
        """Reads a case from its beginning to its end."""
        return self.go_on(self.cache(capacity, case.prompt), case.q, case.k, case.v, case.counts)

    def hoard(self, case: Case, capacity: int | None = None) -> History:
        """As `read`, but `retain` evicts nothing, because the prompt does not end."""
        return self._replace(policy=oneshot(self.policy)).read(dataclasses.replace(case, prompt=ENDLESS), capacity)

    def go_on(self, cache: LayerCache, q, k, v, counts) -> History:
        """Reads ``counts [steps]`` tokens in turn into a cache that may hold some already."""
        return _read(self.policy, cache, q, k, v, counts, step=self.implementation.step)

    def read_batch(self, cases: tuple[Case, ...], capacity: int) -> History:
        """Several cases at once: every array of the history has a leading ``batch`` axis."""
        q, k, v, counts = (np.stack([getattr(case, name) for case in cases]) for name in ("q", "k", "v", "counts"))
        cache = self.cache(capacity, np.array([case.prompt for case in cases]), batch=len(cases))
        return _read_batch(self.policy, cache, q, k, v, counts, step=self.implementation.step)


_made: dict[Any, tuple[Any, LayerCache]] = {}


def _empty(make_cache, policy, shape: CacheSpec, **batch: int) -> LayerCache:
    """An empty cache. If one was made for the same policy object before, that one is returned."""
    key = make_cache, id(policy), shape, *batch.values()
    if key not in _made:
        if len(_made) > 16:
            _made.clear()
        _made[key] = policy, make_cache(policy, shape, **batch)  # with the policy, so that its id is not reused
    return _made[key][1]


@partial(jax.jit, static_argnames="step")
def _read(policy, cache, q, k, v, counts, *, step) -> History:
    def body(carry, count):
        cache, start = carry
        pieces = (jax.lax.dynamic_slice_in_dim(x, start, CHUNK) for x in (q, k, v))
        output, cache = step(policy, cache, *pieces, count)
        real = (iota(CHUNK) < count)[:, None, None, None]
        return (cache, start + count), (by_head(cache), cache.overflow, jnp.where(real, output, 0))

    (cache, _), (position, overflow, outputs) = jax.lax.scan(body, (cache, jnp.int32(0)), jnp.asarray(counts))
    return History(position, overflow, outputs, cache)


@partial(jax.jit, static_argnames="step")
def _read_batch(policy, cache, q, k, v, counts, *, step) -> History:
    return jax.vmap(lambda *row: _read(policy, *row, step=step))(cache, q, k, v, counts)
