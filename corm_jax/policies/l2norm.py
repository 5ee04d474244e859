"""L2 norm: keys of low norm draw attention, so those of high norm are evicted (arXiv 2406.11430).

The norm is known before any query comes: nothing is observed but the keys themselves. On a budget, the key with the
largest norm is evicted (section 4). The paper does not evict in the first two layers; give those `Full`, one policy a
layer. In layer 0 all keys of one token have the same norm, up to the rounding of their rotation, which then decides.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from corm_jax.core.observation import Observation
from corm_jax.core.options import policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec
from corm_jax.errors import CormError


@policy
class L2Norm(Policy):
    """On a budget, keep the keys of lowest norm.

    Without one (`corm_jax.budget`) nothing is evicted before the slots run out.
    """

    @property
    def traits(self) -> Traits:
        return Traits(needs=("keys",))

    def init(self, spec: CacheSpec) -> Float[Array, "*slots"]:
        return jnp.zeros(spec.slots, jnp.float32)

    def observe(self, state: Float[Array, "*slots"], observation: Observation, slots: Slots) -> Float[Array, "*slots"]:
        if observation.keys is None:
            raise CormError("l2norm looks at keys, which an attention trace does not hold: record a qkv trace")
        return jnp.linalg.norm(observation.keys.astype(jnp.float32), axis=-1)

    def score(self, state: Float[Array, "*slots"], slots: Slots) -> Float[Array, "*slots"]:
        return -state
