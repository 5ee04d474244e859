"""The full cache: every key stays. The baseline of every table.

Without a free slot the oldest key goes, so that a capped full cache is a sliding window.
"""

from jaxtyping import Array, Bool, Int

from corm_jax.policies.options import policy
from corm_jax.types import CacheSpec, Observation, Slots


@policy
class Full:
    """Keep everything."""

    needs = ()

    @property
    def protected(self) -> int:
        return 0

    def init(self, spec: CacheSpec) -> tuple[()]:
        return ()

    def observe(self, state: tuple[()], observation: Observation, slots: Slots) -> tuple[()]:
        return state

    def retain(self, state: tuple[()], slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live

    def rank(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return slots.position
