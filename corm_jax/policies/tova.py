"""TOVA: the token that the last query attended to least is evicted (arXiv 2401.06104).

    a[i]  =  mean over all heads of the layer of the newest query's attention to token i

All heads of a layer keep the same tokens (section 3, figure 2). There are no sinks and no recent window: what is kept
is what is attended to. The newest token is a candidate like any other.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from corm_jax.core.observation import Observation
from corm_jax.core.options import policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec


@policy
class TOVA(Policy):
    """On a budget, keep what the newest query attends to.

    Without one (`corm_jax.budget`) nothing is evicted before the slots run out.
    """

    @property
    def traits(self) -> Traits:
        return Traits(needs=("attention",), independent=False, twins=True)

    def init(self, spec: CacheSpec) -> Float[Array, "*slots"]:
        return jnp.zeros(spec.slots, jnp.float32)

    def observe(self, state: Float[Array, "*slots"], observation: Observation, slots: Slots) -> Float[Array, "*slots"]:
        newest = observation.seen == slots.seen  # of the chunk's queries; none if all are padding
        attention = jnp.where(newest, observation.mean, 0.0).sum(0)
        return jnp.where(newest.any(), slots.mean_over_heads(attention), state)

    def score(self, state: Float[Array, "*slots"], slots: Slots) -> Float[Array, "*slots"]:
        return state
