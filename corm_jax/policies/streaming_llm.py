"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453).

The first few tokens draw attention whatever they say, so a window alone breaks down once they leave it. Keep them,
and the newest keys; of the others the oldest goes (section 3.2). A budget of B keys leaves the ``sinks`` and the newest
B - ``sinks``.

The authors rotate queries and keys by their place in the cache, 0 to B - 1, so that a model never meets a distance that
it was not trained on: ``positions=cache``. Most ports keep the positions of the text, another method: the default here,
since a recorded trace holds keys that are rotated already.
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

    sinks: PerHead = number(4, "first tokens that never go", least=0)
    positions: str = choice("original", "cache", help="rotate keys by position in the text | in the cache")

    @property
    def traits(self) -> Traits:
        return Traits(protected=self.sinks, needs=(), positions=self.positions)

    def score(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return jnp.where(slots.position < slots.broadcast(self.sinks), jnp.iinfo(jnp.int32).max, slots.position)
