"""A budget: any policy, made to keep at most so many keys of a head.

After the policy itself has decided which keys stay, the keys with the lowest scores are evicted until the budget holds.
A policy that only scores keys (H2O, TOVA, StreamingLLM) thereby keeps a fixed number, and one that decides by itself
(CORM) keeps at most that many. A query attends to the keys on the budget and to the tokens of its own chunk; a cache
needs slots for both. Under a policy that keeps the whole prompt until it has been read, the budget holds from then on.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.options import (
    INT32,
    combined,
    concrete,
    first_below,
    held,
    is_share,
    number,
    numbers_in,
    policy,
    settled_size,
    thousandths,
)
from corm_jax.core.policy import Policy, Traits, check_policy
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import State
from corm_jax.core.wrapper import Wrapper, innermost
from corm_jax.errors import CormError


@policy
class Budget(Wrapper):
    """A policy on a budget: see `budget`, which makes it.

    A step evicts at most as many keys of a head as it adds, which is enough if the budget held before. If a budget is
    lowered in the middle of a text, steps of one token do not bring the cache down to it.

    Attributes:
      policy: the policy.
      tokens: keys of a head that may stay. A number, or one for each head.
      per_mille: thousandths of the tokens seen that may stay, added to ``tokens``. Likewise. Rounded down, but never
        below what the policy protects, and never below one.
    """

    tokens: PerHead = number(0, "keys of a head that may stay", least=0)
    per_mille: PerHead = number(0, "thousandths of the tokens seen that may stay", least=0, most=1000)

    def __post_init__(self):
        super().__post_init__()
        if has_own_budget(self.policy):
            name = type(innermost(self.policy)).__name__
            raise CormError(
                f"{name} has a budget of its own: set that, or call corm_jax.budget(policy, size), which does"
            )
        if not concrete(self.tokens) or not concrete(self.per_mille):
            return
        tokens, per_mille = np.broadcast_arrays(self.tokens, self.per_mille)
        if np.any(tokens + per_mille == 0):
            raise CormError("a budget must be a whole number of keys from 1 up, or a share such as 0.25, not 0")
        if low := first_below(np.where(per_mille > 0, INT32.max, tokens), self.policy.traits.protected):
            raise CormError(f"a budget of {low[0]} keys is below the {low[1]} that the policy never evicts: raise it")

    @property
    def traits(self) -> Traits:
        inner = super().traits
        inner = inner._replace(moments=0)
        known = concrete(self.tokens) and concrete(self.per_mille) and concrete(inner.protected)
        if inner.whole_prompt or not known or np.any(self.per_mille):
            return inner._replace(most=None if inner.whole_prompt else inner.most)
        most = combined("maximum", self.tokens, inner.protected)
        return inner._replace(most=most if inner.most is None else combined("minimum", most, inner.most))

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        keep = slots.live & self.policy.retain(state, slots)
        rest = slots.restrict(keep)
        over = rest.sum_per_head(rest.live) - self.limit(slots.seen)
        most = slots.arrived  # since it held before they came
        if self.traits.whole_prompt and slots.reading:
            over, most = jnp.where(slots.seen < slots.prompt, 0, over), None
        return keep & ~rest.lowest(self.policy.score(state, rest), over, most)

    def limit(self, seen: Int[Array, ""]) -> Int[Array, "..."]:
        """How many keys of a head may stay after ``seen`` tokens."""
        least = jnp.maximum(jnp.asarray(self.policy.traits.protected, jnp.int32), 1)
        return jnp.maximum(self.limit_of_share(seen), least)

    def limit_of_share(self, seen: Int[Array, ""] | int) -> Int[Array, "..."]:
        """The budget after ``seen`` tokens, which may be less than the policy protects."""
        tokens, share = jnp.asarray(self.tokens, jnp.int32), thousandths(self.per_mille, seen)
        return jnp.minimum(tokens, ENDLESS - share) + share  # the sum would exceed int32


def budget(policy: Policy, size: PerHead) -> Policy:
    """A policy on a budget.

    A policy that has a ``budget`` of its own (SnapKV, PyramidKV, Ada-KV, Scissorhands) gets this one in its place, also
    inside `protect` and `oneshot`; any other is wrapped in `Budget`. That is what ``budget=`` means in a SPEC.

    Args:
      policy: the policy that ranks the keys.
      size: keys of a head, a whole number from 1 up; or a share of the tokens seen, a fraction in (0, 1], to the
        thousandth. A number, or one for each head.

    Raises:
      CormError: for another size, or fewer keys than the policy never evicts.

    >>> from corm_jax.policies import H2O, SnapKV
    >>> budget(H2O(recent=128), 256).tokens, budget(H2O(recent=128), 0.25).per_mille
    (256, 250)
    >>> budget(SnapKV(window=4), 0.25)
    SnapKV(budget=0.25, window=4, kernel=7, pool='max')
    """
    check_policy(policy)
    size = settled_size("budget", size)
    if _field(policy):
        return dataclasses.replace(policy, budget=size)  # pyright: ignore
    if has_own_budget(policy):
        return dataclasses.replace(policy, policy=budget(policy.policy, size))  # pyright: ignore
    if not is_share(size):
        return Budget(policy=policy, tokens=size, per_mille=0)
    per_mille = (
        jnp.round(1000 * size).astype(jnp.int32) if not concrete(size) else np.rint(1000 * np.asarray(size)).astype(int)
    )
    return Budget(policy=policy, tokens=0, per_mille=per_mille)


class TooSmall(NamedTuple):
    """A budget that is less than a policy protects.

    Attributes:
      keys: keys of a head that the budget comes to.
      tokens: the tokens of which the budget is a share.
      protected: keys of a head that are never evicted.
      options: the options that protect them, as in ``{"recent": 256}``.
    """

    keys: int
    tokens: int
    protected: int
    options: dict[str, int]


def too_small(policy: Any, tokens: int, prompt: int | None = None) -> TooSmall | None:
    """What a budget that is a share comes to, if it is less than the policy protects; otherwise None.

    Such a budget is not refused when the policy is made, since it becomes larger with the text. Until then the policy
    keeps what it protects.

    Args:
      policy: the policy.
      tokens: the tokens that are read in all.
      prompt: how many of them are the prompt, for policies whose budget is a share of it.

    >>> from corm_jax.policies import H2O
    >>> too_small(budget(H2O(recent=64), 0.25), tokens=200)
    TooSmall(keys=50, tokens=200, protected=64, options={'recent': 64})
    >>> too_small(budget(H2O(recent=64), 0.25), tokens=400)
    """
    inside: Any = policy
    while isinstance(inside, Wrapper) and not isinstance(inside, Budget):
        inside = inside.policy
    names = {"sinks", "recent"}
    if isinstance(inside, Budget) and np.any(inside.per_mille):
        sizes, protected = inside.limit_of_share(tokens), inside.policy.traits.protected
    elif _field(inside) and is_share(own := getattr(inside, "budget")):  # noqa: B009
        protected = inside.traits.protected
        if inside.traits.whole_prompt:  # such as SnapKV, which keeps the last queries of the prompt
            tokens, protected, names = prompt or tokens, getattr(inside, "window", protected), names | {"window"}
        sizes = held(own, tokens)
    else:
        return None
    if not (low := first_below(np.asarray(sizes), protected)):
        return None
    leaves = {path.split(".")[-1]: int(np.max(leaf)) for path, leaf in numbers_in(inside).items()}
    return TooSmall(low[0], tokens, low[1], {name: leaves[name] for name in sorted(names) if leaves.get(name)})


def has_own_budget(policy: Any) -> bool:
    """Whether the policy, inside its wrappers, has a field ``budget``."""
    return _field(innermost(policy))


def _field(policy: Any) -> bool:
    return "budget" in getattr(policy, "__dataclass_fields__", ())
