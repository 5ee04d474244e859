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
"""Everything that a policy may need beside positions: attention probabilities, keys, values and queries."""


class Traits(NamedTuple):
    """What a policy declares about itself, independent of any text. `simulator.testing` checks the declaration.

    Attributes:
      protected: how many keys of a head `Policy.score` scores above all others: a cache needs more slots than that.
      recent: how many of the newest keys of a head are never evicted.
      most: how many keys of a head are live at most after an eviction, which determines the cache's capacity; None if
        that depends on the text.
      needs: what the policy observes beside positions, some of `EVERYTHING`. What is not needed costs nothing: it is
        not computed under `jax.jit`.
      positions: ``"cache"`` if keys are to be rotated by their place among the live keys of their head; ``"original"``
        if by their position in the text.
      whole_prompt: whether the policy keeps every key until the prompt has been read; the cache then has to be told
        where the prompt ends.
      independent: whether the keys that a head keeps depend on that head alone, as long as there are free slots. The
        heads of such a policy may be on different devices.
      twins: whether the policy calls `Slots.mean_over_heads`. The cache then records in which slot each head holds the
        same token, which makes a sort unnecessary.
      moments: a number of queries. Before so many queries are read, the one clock at which each key can be evicted is
        known, and a query that finds the key important before that clock puts it off until after these queries. Such a
        policy has a method ``moment(state, slots)``, that clock for each slot, and, if it needs attention,
        ``important(observation, slots)``, bool ``[tokens, *slots]``, and ``noted(state, important, seen)``, the state
        after these verdicts. 0 if there is no such number.
      plain: whether the policy supports only attention of the plain form, ``softmax(q . k)`` by any scale, over all
        earlier keys. A step with attention of another form is refused.
      merges: whether evicted keys are merged into others, by a method `Policy.merged`. The exact recurrence then reads
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
        """What the policy declares about itself, in one place."""
        return Traits()

    def init(self, spec: CacheSpec) -> State:
        """The state of empty slots. A slot that is reused starts from here again."""
        return ()

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        """The state after the newest queries attended."""
        return state

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        """Which slots to keep. The result for empty slots is ignored."""
        return slots.live

    def score(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        """A number for each key: without a free slot the key with the lowest is evicted, among equals the oldest.

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
        """Keys, values and state after the live slots outside ``keep`` have been merged into others.

        It is called, if `Traits.merges`, before keys are evicted, by `retain` or for want of a free slot. The result
        for slots outside ``keep`` is ignored. A new key that `retain` does not keep is evicted in the step that adds
        it: only the queries of its own chunk have attended to it.
        """
        raise NotImplementedError

    def for_layer(self, layer: int, layers: int) -> "Policy":
        """The policy of one layer, counted from 0, where layers differ."""
        return self

    def moment(self, state: State, slots: Slots) -> Int[Array, "..."]:
        """The clock at which each slot's key can be evicted, see ``moments`` of `Traits`."""
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
