"""Which positions the heads of a layer hold, in any layout."""

import jax
import jax.numpy as jnp

from corm_jax.core.arrays import EMPTY, iota
from corm_jax.core.cache import slots
from corm_jax.core.types import LayerCache


def by_head(cache: LayerCache) -> jax.Array:
    """The positions that each head holds: ``[kv_heads, slots]``, in a pool `EMPTY` where another head owns the slot."""
    stores, _ = cache.position.shape
    kv_heads = len(cache.overflow)
    each = jnp.repeat(cache.position, kv_heads // stores, 0)
    own = jnp.repeat(slots(cache).head, kv_heads // stores, 0) == iota(kv_heads)[:, None]
    return jnp.where(own, each, EMPTY)
