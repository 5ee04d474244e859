"""The data that policies, caches and models exchange: small pytrees. Axes are named as in `corm_jax.core.arrays`.

One layer of one sequence is the unit throughout; batches come from `jax.vmap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from corm_jax.core.layout import Layout
from corm_jax.core.slots import PerHead, Slots
from corm_jax.errors import CormError

EVERYTHING = ("attention", "keys")
"""What a policy may need beside positions: attention probabilities, and the keys themselves."""

State: TypeAlias = PyTree[Any]
"""What a policy remembers: a pytree of arrays that each end in the slot axes, ``[..., *slots]``."""


Capacity: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | np.ndarray
"""Slots a key-value head (in a pool, on average): of all layers, or of each."""


class CacheSpec(NamedTuple):
    """The static shape of one layer's cache for one sequence: ``k, v [*slots, head_dim]``.

    Attributes:
      kv_heads: key-value heads.
      capacity: slots a head, on average over those that share a store.
      head_dim: numbers a key.
      dtype: of keys and values.
      stores: sets of slots, each shared by equally many heads: 1 is a pool for the layer. None: one for each head.
    """

    kv_heads: int
    capacity: int
    head_dim: int
    dtype: Any = jnp.float32
    stores: int | None = None

    @property
    def slots(self) -> tuple[int, int]:
        """The slot axes ``stores slots``, the shape of everything that a policy keeps per slot."""
        stores = self.stores or self.kv_heads
        return stores, self.kv_heads * self.capacity // stores


class Observation(NamedTuple):
    """What the newest queries saw: their attention over the slots, before any eviction.

    Probabilities are kept as softmax computes them, ``alpha = weights / total``. Comparisons such as alpha >= 1/n are
    then exact where ties are (n equal logits give weights 1 and total n), and a policy that needs only comparisons
    costs no second pass over the exponentials. A fused attention that returns the logsumexp fits as
    ``weights = exp(logits - logsumexp), total = 1``. Queries that only pad a ragged batch have zero weights. So have
    those without a softmax (a logit is NaN or +infinity): probabilities are numbers, whatever the model computes. No
    gradient goes through an observation.

    Attributes:
      weights: float32 ``[group, tokens, *slots]``.
      total: float32, broadcastable against ``weights``: the sum over the slots of each head.
      visible: bool ``[tokens, *slots]``, which slots the query could attend to.
      seen: int32, broadcastable against ``visible``: the clock at each query (its position + 1).
      keys: ``[*slots, head_dim]``, what the slots hold; None where a trace does not tell.
    """

    weights: Float[Array, "group tokens *slots"]
    total: Float[Array, "group tokens *slots_or_1"]
    visible: Bool[Array, "tokens *slots"]
    seen: Int[Array, "tokens *ones"]
    keys: Float[Array, "*slots head_dim"] | None = None

    @property
    def probability(self) -> Float[Array, "group tokens *slots"]:
        """alpha, the attention probabilities."""
        return self.weights / self.total


def observed(
    layout: Layout,
    weights: Float[Array, "group tokens *slots"],
    total: Float[Array, "group tokens kv_heads"],
    visible: Bool[Array, "tokens *slots"],
    seen: Int[Array, "tokens *ones"],
    keys: Float[Array, "*slots head_dim"] | None,
) -> Observation:
    """What a policy gets to see of an attention: of a query without a softmax (its total is NaN), weights of 0."""
    total = layout.spread(total)
    broken = jnp.isnan(total)
    return Observation(jnp.where(broken, 0.0, weights), jnp.where(broken, 1.0, total), visible, seen, keys)


@runtime_checkable
class Policy(Protocol):
    """An eviction rule: hyperparameters in a frozen dataclass that is a pytree, and four pure functions.

    `corm_jax.policy` makes such a class. Numbers such as a window are leaves: they may be traced, mapped over by
    `jax.vmap`, and arrays ``[kv_heads]`` where a scalar was, or
    ``[layers, kv_heads]`` in a policy for a whole model. Choices are static metadata. The cache calls, for each
    chunk of newest tokens: `rank` while there are fewer free slots than new keys, `observe` after attention, then
    `retain`.

    The rest is voluntary: an attribute for any of the `Traits`, and a method ``for_layer(layer, layers)``, which
    returns the policy of one layer, counted from 0, where they differ.
    """

    @property
    def protected(self) -> PerHead:
        """How many keys of a head `rank` never gives up: the least capacity that makes sense."""
        ...

    def init(self, spec: CacheSpec) -> State:
        """The state of empty slots. A slot that is reused starts from here again."""
        ...

    def observe(self, state: State, observation: Observation, slots: Slots) -> State:
        """The state after the newest queries attended."""
        ...

    def retain(self, state: State, slots: Slots) -> Bool[Array, "*slots"]:
        """Which slots to keep. What is said of empty slots does not matter."""
        ...

    def rank(self, state: State, slots: Slots) -> Num[Array, "*slots"]:
        """Who goes first when slots run out: the lowest, among equals the oldest key. NaN is as low as -infinity."""
        ...


class Traits(NamedTuple):
    """What a policy says of itself, before it has seen anything. `simulator.testing` holds it to that.

    Attributes:
      protected: how many keys of a head `Policy.rank` never gives up: the least capacity that makes sense.
      recent: the newest so many keys of a head are never evicted.
      most: so many keys of a head are live at most after an eviction, which determines the capacity of caches; None if
        that depends on the text.
      needs: what it looks at beside positions, of `EVERYTHING`. What is not needed costs nothing: it is not computed
        under `jax.jit`.
      positions: ``"cache"`` if keys are to be rotated by their place among those of their head that are live, not by
        their place in the text, ``"original"``.
      whole_prompt: whether it keeps every key until the prompt has been read, and has to be told where the prompt ends.
      independent: whether what a head keeps hangs on that head alone.
      moments: in so many queries one after the other, the only moment at which a key can be evicted is known before
        they come, and somebody who finds the key important by then puts it off beyond them. Such a policy has a method
        ``moment(state, slots)``, the clock of that moment for each slot, and, if it needs attention,
        ``important(observation, slots)``, bool ``[tokens, *slots]``. 0 if there is no such number.
      block: queries that the exact recurrence reads at once, see `corm_jax.core.exact`. Does not change results.
    """

    protected: PerHead = 0
    recent: PerHead = 0
    most: PerHead | None = None
    needs: tuple[str, ...] = EVERYTHING
    positions: str = "original"
    whole_prompt: bool = False
    independent: bool = True
    moments: PerHead = 0
    block: int = 64


def traits(policy: Any) -> Traits:
    """What a policy says of itself: its attributes of these names, and the defaults for those that it lacks.

    A policy around another has an attribute ``traits`` instead, see `corm_jax.core.wrapper`.

    Raises:
      CormError: for a need that is not in `EVERYTHING`, or other positions than ``"original"`` and ``"cache"``.
    """
    found = getattr(policy, "traits", None)
    if not isinstance(found, Traits):
        found = Traits(**{name: getattr(policy, name, default) for name, default in Traits._field_defaults.items()})
    name = type(policy).__name__
    if isinstance(found.needs, str) or not set(found.needs) <= set(EVERYTHING):
        raise CormError(f"{name} needs {found.needs!r}: needs must be a tuple of some of {EVERYTHING}")
    if found.positions not in ("original", "cache"):
        raise CormError(f"{name} has positions={found.positions!r}: it must be 'original' or 'cache'")
    return found


def check_policy(policy: Any) -> None:
    """Raises unless this is a policy, and one policy."""
    if isinstance(policy, type) or not isinstance(policy, Policy):
        what = f"{len(policy)} of them" if isinstance(policy, list | tuple) else " ".join(repr(policy).split())[:80]
        raise CormError(f"a policy must be an object such as Corm(window=64), or corm_jax.parse(SPEC), not {what}")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Made:
    """What is known of a cache without its arrays. It is static, so that a mistake shows while a program is traced.

    Attributes:
      policy: the name of the policy whose state the cache holds.
      prompt: ``"unknown"`` if nobody said where the prompt ends, ``"reading"`` from then on, ``"read"`` after it.
      enough: whether there are slots for all tokens that will be read, though fewer than the policy protects keys.
      roomy: whether there are slots for all tokens of the prompt: none of them overflows.
      block: queries that the exact recurrence reads at once; None for what the policy says.
      moments: whether that many are within the policy's ``moments``; None if nobody looked.
    """

    policy: str
    prompt: str = "unknown"
    enough: bool = False
    roomy: bool = False
    block: int | None = None
    moments: bool | None = None


class LayerCache(NamedTuple):
    """One layer's keys and values in a fixed number of slots, with the policy's state beside them.

    Position is data, slot is storage: a key may sit in any slot of its store. In a batch every leaf has a leading
    ``batch`` axis, and each row its own clock.

    Attributes:
      k, v: ``[*slots, head_dim]``, keys rotated at their positions, unless the policy counts ``positions`` within the
        cache. Values are finite, those of empty slots too: see `corm_jax.core.cache.stored`.
      position: int32 ``[*slots]``, `EMPTY` where no key is.
      state: the policy's state.
      seen: int32 scalar, tokens read so far.
      prompt: int32 scalar, how many there are when the prompt has been read; `ENDLESS` if nobody said.
      overflow: int32 ``[kv_heads]``, keys that were evicted because no slot was free.
      layout: whose slots they are.
      twin: int32 ``[kv_heads, *slots]``, for a policy whose heads are not independent: in which slot, counted over all
        stores, each head has or had the token whose key a slot holds. None for others.
      made: what is known of it without its arrays. None if that is nothing.
    """

    k: Float[Array, "*slots head_dim"]
    v: Float[Array, "*slots head_dim"]
    position: Int[Array, "*slots"]
    state: State
    seen: Int[Array, ""]
    prompt: Int[Array, ""]
    overflow: Int[Array, " kv_heads"]
    layout: Layout
    twin: Int[Array, "kv_heads *slots"] | None = None
    made: Made | None = None


Caches: TypeAlias = tuple[LayerCache, ...]
"""The caches of a model: one a layer, each leaf with a leading ``batch`` axis."""


class Usage(NamedTuple):
    """How full the caches of a model are. Arrays have the axes ``[layer, batch, kv_heads]`` unless said otherwise.

    Attributes:
      live: int32, slots that hold a key.
      seen: int32 ``[batch]``, tokens read.
      overflow: int32, keys that went for want of a slot.
      bytes_live: bytes of the keys and values that are live.
      bytes_full: bytes of the keys and values that an uncompressed cache of the same sequences holds.
      bytes_allocated: bytes of every array of the caches, policy state included, whether in use or not.
    """

    live: jax.Array
    seen: jax.Array
    overflow: jax.Array
    bytes_live: int
    bytes_full: int
    bytes_allocated: int
