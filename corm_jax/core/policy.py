"""What a policy is: an eviction rule as a pytree of hyperparameters and pure functions of a state."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from corm_jax.core.observation import Observation
from corm_jax.core.options import concrete
from corm_jax.core.slots import PerHead, Slots
from corm_jax.core.types import CacheSpec, State
from corm_jax.errors import CormError

EVERYTHING = ("attention", "keys", "values", "queries")
"""What a policy may need beside positions: attention probabilities, and the keys, values and queries themselves."""


class Traits(NamedTuple):
    """What a policy says of itself, before it has seen anything. `simulator.testing` holds it to that.

    Attributes:
      protected: how many keys of a head `Policy.score` holds back to the last: the least capacity that makes sense.
      recent: the newest so many keys of a head are never evicted.
      most: so many keys of a head are live at most after an eviction, which determines the capacity of caches; None if
        that depends on the text.
      needs: what it looks at beside positions, of `EVERYTHING`. What is not needed costs nothing: it is not computed
        under `jax.jit`.
      positions: ``"cache"`` if keys are to be rotated by their place among those of their head that are live, not by
        their place in the text, ``"original"``.
      whole_prompt: whether it keeps every key until the prompt has been read, and has to be told where the prompt ends.
      independent: whether what a head keeps hangs on that head alone, as long as there are free slots. Heads of such a
        policy may be on different devices.
      twins: whether it asks for `Slots.mean_over_heads`, which takes no sort if the cache notes where each head has the
        same token.
      moments: in so many queries one after the other, the only moment at which a key can be evicted is known before
        they come, and somebody who finds the key important by then puts it off beyond them. Such a policy has a method
        ``moment(state, slots)``, the clock of that moment for each slot, and, if it needs attention,
        ``important(observation, slots)``, bool ``[tokens, *slots]``, and ``noted(state, important, seen)``, the state
        after that. 0 if there is no such number.
      plain: whether it makes sense for attention of the plain form alone, ``softmax(q . k)`` by any scale, over all
        earlier keys. A step of another form is refused.
      merges: whether what leaves is merged into what stays, by a method `Policy.merged`. The exact recurrence then goes
        token by token.
      block: queries that the exact recurrence reads at once, see `corm_jax.core.exact`. Does not change results.
    """

    protected: PerHead = 0
    recent: PerHead = 0
    most: PerHead | None = None
    needs: tuple[str, ...] = EVERYTHING
    positions: str = "original"
    whole_prompt: bool = False
    independent: bool = True
    twins: bool = False
    moments: PerHead = 0
    plain: bool = False
    merges: bool = False
    block: int = 64


class Policy:
    """An eviction rule: hyperparameters in a frozen dataclass that is a pytree, and pure functions.

    A policy inherits from this class and is decorated with `corm_jax.policy`. Numbers such as a window are leaves: they
    may be traced, mapped over by `jax.vmap`, and arrays ``[kv_heads]`` where a scalar was, or ``[layers, kv_heads]`` in
    a policy for a whole model. Choices are static metadata.

    The cache calls, for each chunk of newest tokens: `score` while there are fewer free slots than new keys, `observe`
    after attention, then `retain`. A policy has to say how it scores keys; the rest has defaults, under which it
    remembers nothing and evicts nothing before the slots run out.

    >>> import jax.numpy as jnp
    >>> import corm_jax as cj
    >>> from corm_jax.policies import number
    >>> @cj.policy
    ... class Sinks(cj.Policy):
    ...     # Without a free slot the oldest key is evicted, but never one of the first.
    ...     first: int = number(4, "first tokens that are never evicted", least=0)
    ...
    ...     @property
    ...     def traits(self):
    ...         return cj.Traits(protected=self.first, needs=())
    ...
    ...     def score(self, state, slots):
    ...         return jnp.where(slots.position < slots.broadcast(self.first), 2**31 - 1, slots.position)
    >>> cj.budget(Sinks(first=2), 64).traits.most
    64
    """

    @property
    def traits(self) -> Traits:
        """What it says of itself, in one place."""
        return Traits()

    def init(self, spec: CacheSpec) -> State:
        """The state of empty slots. A slot that is reused starts from here again."""
        return ()

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        """The state after the newest queries attended."""
        return state

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        """Which slots to keep. What is said of empty slots does not matter."""
        return slots.live

    def score(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        """How much each key is worth: without a free slot the lowest is evicted, among equals the oldest.

        NaN is as low as -infinity.
        """
        raise NotImplementedError

    def merged(
        self,
        k: Float[Array, "*slots head_dim"],
        v: Float[Array, "*slots head_dim"],
        state: State,
        slots: Slots,
        keep: Bool[Array, "*slots"],
    ) -> tuple[Float[Array, "*slots head_dim"], Float[Array, "*slots head_dim"], State]:
        """Keys, values and state after the live slots that are not to be kept have been merged into others.

        That is called, if `Traits.merges`, before keys leave, whether `retain` does not keep them or a slot is wanted.
        What it makes of slots that are not kept does not matter. A newcomer that `retain` refuses leaves at the door:
        its own query, or chunk, has attended to it, and nobody else.
        """
        raise NotImplementedError

    def for_layer(self, layer: int, layers: int) -> "Policy":
        """The policy of one layer, counted from 0, where layers differ."""
        return self

    def moment(self, state: State, slots: Slots) -> Int[Array, "..."]:
        """The clock of each slot's moment, see ``moments`` of `Traits`."""
        raise NotImplementedError

    def important(self, observation: Observation, slots: Slots) -> Bool[Array, "tokens *slots"]:
        """Which keys each query found important, see ``moments`` of `Traits`."""
        raise NotImplementedError

    def noted(self, state: State, important: Bool[Array, "tokens *slots"], seen: Int[Array, "tokens *ones"]) -> State:
        """The state after queries at these clocks found these keys important: what `observe` returns then."""
        raise NotImplementedError


def check_policy(policy: Any) -> None:
    """Raises unless this is a policy, and one policy, and what it says of itself can be."""
    name = type(policy).__name__
    if isinstance(policy, type) or not isinstance(policy, Policy):
        what = f"{len(policy)} of them" if isinstance(policy, list | tuple) else " ".join(repr(policy).split())[:80]
        raise CormError(
            f"a policy must be an object such as Corm(window=64), or corm_jax.parse(SPEC), not {what}: your own class "
            "inherits from corm_jax.Policy"
        )
    if jax.tree_util.all_leaves([policy]):
        raise CormError(f"{name} is no pytree: decorate the class with corm_jax.policy")
    if type(policy).score is Policy.score:
        raise CormError(f"{name} has no `score`: say how much each key is worth, see corm_jax.Policy")
    about = policy.traits
    if not isinstance(about, Traits):
        raise CormError(f"{name} has traits {about!r}: they must be corm_jax.Traits(...)")
    if isinstance(about.needs, str) or not set(about.needs) <= set(EVERYTHING):
        raise CormError(f"{name} needs {about.needs!r}: needs must be a tuple of some of {EVERYTHING}")
    if about.positions not in ("original", "cache"):
        raise CormError(f"{name} has positions={about.positions!r}: it must be 'original' or 'cache'")
    if not (concrete(about.moments) and not np.any(about.moments)):
        wanted = ("moment", "important", "noted") if "attention" in about.needs else ("moment",)
        if missing := [method for method in wanted if getattr(type(policy), method) is getattr(Policy, method)]:
            raise CormError(f"{name} has moments, but no `{missing[0]}`: define it, or say moments=0 in its traits")
