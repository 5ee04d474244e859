"""Random: keys are evicted at random. The control that every policy has to beat.

The key to evict is drawn anew at every step, from a hash of the seed, the clock, the key's position, and its first
coordinate, so that every head of every layer has a draw of its own. The same seed gives the same evictions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from corm_jax.core.observation import Observation
from corm_jax.core.options import number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec


@policy
class Random(Policy):
    """On a budget, keep keys at random.

    Without a budget (`corm_jax.budget`) nothing is evicted before the slots run out.

    Args:
      seed: of the draw. A number, or one for each head.
      recent: newest keys that are never evicted.
    """

    seed: PerHead = number(0, "another seed, another draw", least=0)
    recent: PerHead = number(1, "newest keys that are never evicted", least=0)

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.recent, recent=self.recent, needs=("keys",))

    def init(self, spec: CacheSpec) -> UInt[Array, "*slots"]:
        return jnp.zeros(spec.slots, jnp.uint32)

    def observe(self, state: UInt[Array, "*slots"], observation: Observation, slots: Slots) -> UInt[Array, "*slots"]:
        if observation.keys is None:
            return state
        return jax.lax.bitcast_convert_type(observation.keys[..., 0].astype(jnp.float32), jnp.uint32)

    def score(self, state: UInt[Array, "*slots"], slots: Slots) -> Int[Array, "*slots"]:
        draw = state
        for number_ in (slots.position, slots.seen, slots.broadcast(self.seed)):
            draw = _mix(draw ^ number_.astype(jnp.uint32))
        return jnp.where(slots.newest(self.recent), jnp.iinfo(jnp.int32).max, (draw >> 1).astype(jnp.int32))


def _mix(x: Array) -> Array:
    # The finalizer of MurmurHash3: every bit of the input changes every bit of the output with probability 1/2.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
