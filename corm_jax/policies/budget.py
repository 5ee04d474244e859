"""A budget: any policy, made to keep at most so many keys of a head.

After the policy itself has decided what stays, the keys that it ranks lowest go until the budget holds. That makes a
fixed-size policy of one that only ranks (H2O, TOVA, StreamingLLM), and puts a bound on one that decides (CORM). A query
attends to the budget and to the tokens of its own chunk; a cache needs room for both.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from corm_jax.errors import CormError
from corm_jax.policies.options import concrete, policy
from corm_jax.policies.wrapper import Wrapper
from corm_jax.types import ENDLESS, PerHead, Policy, Slots, State


@policy
class Budget(Wrapper):
    """A policy on a budget: see `budget`, which makes it.

    Attributes:
      policy: the policy.
      tokens: keys of a head that may stay. A number, or one for each head.
      per_mille: thousandths of the tokens seen that may stay, added to ``tokens``. Rounded down, but never below
        what the policy protects, and never below one.
    """

    tokens: PerHead = 0
    per_mille: PerHead = 0

    @property
    def most(self) -> PerHead | None:
        """How many keys of a head stay at most; None if that depends on the text."""
        return None if not concrete(self.per_mille) or np.any(self.per_mille) else self.tokens

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        keep = slots.live & self.policy.retain(state, slots)
        rest = slots.only(keep)
        over = rest.total(rest.live) - self.limit(slots.seen)
        return keep & ~rest.lowest(self.policy.rank(state, rest), over)

    def limit(self, seen: Int[Array, ""]) -> Int[Array, "..."]:
        """How many keys of a head may stay after ``seen`` tokens."""
        per_mille, tokens = jnp.asarray(self.per_mille, jnp.int32), jnp.asarray(self.tokens, jnp.int32)
        share = seen // 1000 * per_mille + seen % 1000 * per_mille // 1000  # seen * per_mille would exceed int32
        least = jnp.maximum(jnp.asarray(self.policy.protected, jnp.int32), 1)
        return jnp.maximum(jnp.minimum(tokens, ENDLESS - share) + share, least)


def budget(policy: Policy, size: int | float) -> Budget:
    """A policy on a budget.

    Args:
      policy: who ranks.
      size: keys of a head, a whole number from 1 up; or a share of the tokens seen, a fraction in (0, 1], to the
        thousandth.

    Raises:
      CormError: for another size, or fewer keys than the policy never gives up.

    >>> from corm_jax.policies import H2O
    >>> budget(H2O(recent=128), 256).tokens, budget(H2O(recent=128), 0.25).per_mille
    (256, 250)
    """
    if isinstance(size, float):
        if not 0.0005 <= size <= 1:
            raise CormError(f"a budget that is a share must be in (0, 1], by the thousandth, not {size}")
        return Budget(policy=policy, per_mille=round(1000 * size))
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= np.iinfo(np.int32).max:
        raise CormError(f"a budget must be a whole number of keys from 1 up, or a share such as 0.25, not {size!r}")
    if concrete(policy.protected) and size < (least := int(np.max(policy.protected))):
        raise CormError(f"a budget of {size} keys is below the {least} that the policy never gives up: raise it")
    return Budget(policy=policy, tokens=size)
