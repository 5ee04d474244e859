"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453).

The first few tokens draw attention whatever they are, so a window alone fails as soon as they are evicted. Keep them,
and the newest keys; of the others the oldest is evicted (section 3.2). On a budget of B keys, the ``sinks`` and the
newest B - ``sinks`` stay.

The authors rotate queries and keys by their place in the cache, 0 to B - 1, so that no distance occurs on which the
model was not trained: ``positions=cache``. Most ports rotate by position in the text, which is another method. It is
the default here, since the keys of a recorded trace are rotated already.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from corm_jax.core.options import choice, number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots


@policy
class StreamingLLM(Policy):
    """Keep the first tokens and, on a budget, the newest.

    Without a budget (`corm_jax.budget`) nothing is evicted before the slots run out.

    Args:
      sinks: how many of the first tokens stay. A number, or one for each head.
      positions: rotate by position in the text (``"original"``) or in the cache (``"cache"``).
    """

    sinks: PerHead = number(4, "first tokens that are never evicted", least=0)
    positions: str = choice("original", "cache", help="rotate keys by position in the text | in the cache")

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.sinks, needs=(), positions=self.positions)

    def score(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return jnp.where(slots.position < slots.broadcast(self.sinks), jnp.iinfo(jnp.int32).max, slots.position)
