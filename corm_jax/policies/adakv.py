"""Ada-KV: SnapKV with budgets that differ from head to head (arXiv 2407.11550).

The heads of a layer share one budget. Of b = B - w keys a head beside the window, the ``heads`` b that score highest in
the whole layer would stay; c_h of them belong to head h (section 3.3, algorithm 1). A part of the budget is divided
evenly among the heads, so that every head keeps some:

    b_h  =  round((1 - floor) c_h + floor b),     floor = 0.2  (the paper's alpha)

Within a head, the b_h keys with the highest pooled scores stay, and the window. By rounding, a layer may keep up to
half a key a head more or less than its budget.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from corm_jax.core.options import number, policy
from corm_jax.core.policy import Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.policies.snapkv import SnapKV


@policy
class AdaKV(SnapKV):
    """SnapKV with more keys for heads whose attention is spread.

    Options as for SnapKV; ``budget`` is the mean over the heads of a layer.

    Args:
      floor: the share of the budget that all heads have in common, in thousandths at the finest. A number, or one for
        each head.
    """

    floor: PerHead = number(0.2, "share of the budget that is divided evenly among the heads", least=0, most=1)

    @property
    def traits(self) -> Traits:
        return super().traits._replace(independent=False)

    def allowed(self, pooled: Float[Array, "*slots"], early: Slots) -> Int[Array, "..."]:
        live = early.sum_per_head(early.live)
        even = jnp.broadcast_to(super().allowed(pooled, early), live.shape)
        best = live - early.lowest_of_layer(pooled, live.sum(dtype=jnp.int32) - even.sum(dtype=jnp.int32))  # c_h
        per_mille = jnp.round(1000 * jnp.asarray(self.floor, jnp.float32)).astype(jnp.int32)
        return ((1000 - per_mille) * best + per_mille * even + 500) // 1000  # whole numbers: no rounding decides
