# pyright: strict
"""What a user's file may look like: pyright reads it strictly, so every public name in it has a type that is known."""

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

import corm_jax as cj
from corm_jax.traces.trace import Trace
from simulator.replay import Replay, replay
from simulator.synthetic import noise
from simulator.testing import check_policy


@cj.policy
class Newest(cj.Policy):
    """Keeps the newest keys."""

    def retain(self, state: object, slots: cj.Slots) -> Bool[Array, "stores slots"]:
        return slots.live & slots.newest(4)

    def score(self, state: object, slots: cj.Slots) -> Int[Array, "stores slots"]:
        return slots.position


def survivors(policy: cj.Policy) -> np.ndarray:
    trace: Trace = noise(layers=1, steps=8)
    result: Replay = replay(trace, policy)
    return result.live[..., -1]


def cached() -> jax.Array:
    cache: cj.LayerCache = cj.make_cache(cj.Corm(window=4, recent=2), cj.CacheSpec(2, 8, 4))
    return cache.position


survivors(cj.budget(cj.H2O(recent=2), 6))
survivors(cj.parse("corm:window=4"))
check_policy(Newest(), examples=1, only="shapes")
