"""PyramidKV: SnapKV with budgets that fall from layer to layer (arXiv 2406.02069).

Attention spreads over many keys in the first layers and gathers on few in the last. So of b = B - w keys beside the
window the last layer gets the 20th part and the first as much more, in an arithmetic sequence (section 4.2, beta = 20):

    low = b // 20,   high = 2 b - low,   b_l = high - (high - low) l / (L - 1)      (layers l = 0 ... L - 1)

The b_l sum to L b. The released code floors each and loses some keys; here the sums b_0 + ... + b_l are floored, so
that exactly L b are left. A layer that gets more than the prompt has keeps all of it, and no other gets the rest.
"""

from typing import Any

from corm_jax.policies.options import policy
from corm_jax.policies.snapkv import SnapKV


@policy
class PyramidKV(SnapKV):
    """SnapKV with more keys in the first layers and fewer in the last.

    Options as for SnapKV; ``budget`` is the mean over the layers.

    >>> [PyramidKV(budget=52).for_layer(layer, 4).budget for layer in range(4)]
    [71, 58, 46, 33]
    """

    def for_layer(self, layer: int, layers: int) -> SnapKV:
        """The policy of one layer, counted from 0."""
        fields = {"window": self.window, "kernel": self.kernel, "pool": self.pool}
        return SnapKV(budget=self.window + self._up_to(layer + 1, layers) - self._up_to(layer, layers), **fields)

    def _up_to(self, layer: int, layers: int) -> Any:
        """What the first so many layers get together."""
        b = self.budget - self.window
        low = b // 20
        high = 2 * b - low
        if layers == 1:
            return layer * b
        return (2 * (layers - 1) * layer * high - layer * (layer - 1) * (high - low)) // (2 * (layers - 1))
