"""The full cache: every key stays. The baseline of every table.

Without a free slot the oldest key goes, so that a capped full cache is a sliding window.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.options import policy
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec, Observation


@policy
class Full:
    """Keep everything."""

    needs = ()
    moments = ENDLESS
    block = 256

    @property
    def protected(self) -> int:
        return 0

    def init(self, spec: CacheSpec) -> tuple[()]:
        return ()

    def observe(self, state: tuple[()], observation: Observation, slots: Slots) -> tuple[()]:
        return state

    def retain(self, state: tuple[()], slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live

    def moment(self, state: tuple[()], slots: Slots) -> Int[Array, ""]:
        return jnp.int32(ENDLESS)

    def rank(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return slots.position
