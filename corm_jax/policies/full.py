"""The full cache: every key stays. The baseline of every table.

Without a free slot the oldest key is evicted, so that a full cache with too few slots is a sliding window.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.options import policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import Slots


@policy
class Full(Policy):
    """Keep everything."""

    @property
    def traits(self) -> Traits:
        return Traits(needs=(), moments=ENDLESS, block=256)

    def moment(self, state: tuple[()], slots: Slots) -> Int[Array, ""]:
        return jnp.int32(ENDLESS)

    def score(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return slots.position
