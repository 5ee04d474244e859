"""PyramidKV: SnapKV with budgets that fall from layer to layer (arXiv 2406.02069).

Attention is spread over many keys in the first layers and concentrated on few in the last. So the last layer gets a
20th of the b = B - w keys beside the window, the first layer as much above the mean as the last is below it, and the
layers between an arithmetic sequence (section 4.2, beta = 20):

    low = b // 20,   high = 2 b - low,   b_l = high - (high - low) l / (L - 1)      (layers l = 0 ... L - 1)

The b_l sum to L b. The released code floors each and loses some keys; here the sums b_0 + ... + b_l are floored, so
that exactly L b keys stay. A layer that gets more than the prompt has keeps the whole prompt; no other layer gets the
rest.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from corm_jax.core.options import number, policy
from corm_jax.core.slots import PerHead
from corm_jax.policies.snapkv import SnapKV


@policy
class PyramidKV(SnapKV):
    """SnapKV with more keys in the first layers and fewer in the last.

    Options as for SnapKV; ``budget`` is the mean over the layers.

    >>> [int(PyramidKV(budget=52).for_layer(layer, 4).beside(100)) + 32 for layer in range(4)]
    [71, 58, 46, 33]
    """

    def for_layer(self, layer: int, layers: int) -> SnapKV:
        """The policy of one layer, counted from 0."""
        fields = {"window": self.window, "kernel": self.kernel, "pool": self.pool}
        return PyramidLayer(budget=self.budget, layer=layer, layers=layers, **fields)


@policy
class PyramidLayer(SnapKV):
    """PyramidKV in one layer.

    Args:
      layer: l, from 0.
      layers: L.
    """

    layer: PerHead = number(0, "l: which layer, from 0", least=0)
    layers: PerHead = number(1, "L: how many there are", least=1)

    def beside(self, prompt: Int[Array, ""] | int) -> Int[Array, "..."]:
        b = super().beside(prompt)
        layer, last = jnp.asarray(self.layer, jnp.int32), jnp.asarray(self.layers, jnp.int32) - 1
        low = b // 20
        high = 2 * b - low
        # b_l as a difference of floored sums: sum to l = l high - ceil((high - low) l (l - 1) / 2 / (L - 1)). The part
        # that L - 1 divides is handled apart, so that the products stay far below 2^31.
        each, rest = jnp.divmod(high - low, jnp.maximum(last, 1))
        below, up_to = (-(-rest * (at * (at - 1) // 2) // jnp.maximum(last, 1)) for at in (layer, layer + 1))
        return jnp.where(last > 0, high - each * layer - (up_to - below), b)
