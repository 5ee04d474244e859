"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453).

The first few tokens draw attention whatever they say, so a window alone breaks down once they leave it. Keep them,
and the newest keys; of the others the oldest goes (section 3.2). Keys keep the positions that they were read at; the
authors rotate by position within the cache instead, which differs once the text outgrows it.

On a budget of B keys: ``sinks`` + the newest B - ``sinks``. Looks at positions only.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from corm_jax.policies.options import number, policy, whole
from corm_jax.types import CacheSpec, Observation, PerHead, Slots


@policy
class StreamingLLM:
    """Keep the first tokens and, on a budget, the newest.

    Args:
      sinks: how many of the first tokens stay. A number, or one for each head.
    """

    sinks: PerHead = number(4, "first tokens that never go")

    def __post_init__(self):
        whole(0, sinks=self.sinks)

    @property
    def protected(self) -> PerHead:
        return self.sinks

    def init(self, spec: CacheSpec) -> tuple[()]:
        return ()

    def observe(self, state: tuple[()], observation: Observation, slots: Slots) -> tuple[()]:
        return state

    def retain(self, state: tuple[()], slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live

    def rank(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return jnp.where(slots.position < slots.spread(self.sinks), jnp.iinfo(jnp.int32).max, slots.position)
