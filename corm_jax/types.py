"""The data that policies, caches and models exchange: small pytrees, with their axes named.

One layer of one sequence is the unit throughout; batches come from `jax.vmap`. Axis names, here and everywhere:
``batch layer kv_heads group tokens slots head_dim vocab``. ``*slots`` stands for the slot axes of whatever layout holds
the cache: ``kv_heads capacity`` in the rectangular one, ``pool`` in the pooled one, where any head of the layer may use
any slot. Positions count from 0; the clock ``seen`` (the paper's t) is the number of tokens read so far, the current
one included. Numbers have 32 bits, also where JAX is told to use 64 (``JAX_ENABLE_X64``); the clock ends at `ENDLESS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, Shaped

from corm_jax.errors import CormError

EMPTY = -1
"""The position of a slot that holds no key. Nothing else marks a slot as free."""

ENDLESS = 2**31 - 1
"""Where the clock ends. As the end of a prompt: unknown, so that all that is read belongs to it."""

FEW = 8
"""Up to so many keys are cheaper found one by one than by sorting."""

EVERYTHING = ("attention", "keys")
"""What a policy may need beside positions: attention probabilities, and the keys themselves."""

State: TypeAlias = PyTree[Any]
"""What a policy remembers: a pytree of arrays that each end in the slot axes, ``[..., *slots]``."""


PerHead: TypeAlias = Any
"""A number, or one for each head: of Python, NumPy or JAX, and possibly traced.

``[kv_heads]`` for one layer. A policy for a whole model may have ``[layers, kv_heads]``: `corm_jax.cache.per_layer`.
"""


Capacity: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | np.ndarray
"""Slots a key-value head (in a pool, on average): of all layers, or of each."""


class CacheSpec(NamedTuple):
    """The static shape of one layer's cache for one sequence: ``k, v [*slots, head_dim]``.

    Attributes:
      kv_heads: key-value heads.
      capacity: slots a head; in a pool, on average.
      head_dim: numbers a key.
      dtype: of keys and values.
      pooled: whether the heads share their slots.
    """

    kv_heads: int
    capacity: int
    head_dim: int
    dtype: Any = jnp.float32
    pooled: bool = False

    @property
    def slots(self) -> tuple[int, ...]:
        """The slot axes, the shape of everything a policy keeps per slot."""
        return (self.kv_heads * self.capacity,) if self.pooled else (self.kv_heads, self.capacity)


class Slots(NamedTuple):
    """The slots of one layer of one sequence, as a policy sees them.

    A policy computes slot by slot on arrays that end in ``*slots``. Where it needs a head as a whole it goes through
    `spread`, `total` and the methods below, so that it never has to know how heads share the storage.

    Attributes:
      position: int32 ``[*slots]``, where in the sequence the slot's key stands; `EMPTY` if there is none.
      seen: int32 scalar, the clock: tokens read so far.
      prompt: int32 scalar, the clock at which the prompt ends; `ENDLESS` if nobody said.
      owned: bool ``[kv_heads, pages]``: whose keys each page of slots holds, where ``*slots`` are ``pages size``; in a
        pool, ``[kv_heads, pool]``, each slot by itself. None in a rectangle, which has a page for each head.
    """

    position: Int[Array, "*slots"]
    seen: Int[Array, ""]
    prompt: Int[Array, ""]
    owned: Bool[Array, "kv_heads pages"] | None = None

    @property
    def live(self) -> Bool[Array, "*slots"]:
        """Which slots hold a key."""
        return self.position >= 0

    def newest(self, recent: PerHead) -> Bool[Array, "*slots"]:
        """Which slots hold one of the newest ``recent`` keys (a number, or one for each head)."""
        return self.position >= self.seen - self.spread(recent)

    def spread(self, per_head: PerHead | Num[Array, "... kv_heads"]) -> Num[Array, "..."]:
        """A number, or ``[..., kv_heads]``, in a shape that broadcasts against ``[*slots]``."""
        per_head = jnp.asarray(narrow(per_head))
        if not per_head.ndim:
            return per_head
        if self.owned is not None:
            per_head = jnp.where(self.owned, per_head[..., None], 0).sum(-2, dtype=per_head.dtype)
        return per_head if self.position.ndim == 1 else per_head[..., None]

    def total(self, per_slot: Shaped[Array, "*leading_and_slots"]) -> Num[Array, "*leading kv_heads"]:
        """The sum over each head's slots; of truth values their number, int32."""
        dtype = jnp.int32 if per_slot.dtype == bool else per_slot.dtype
        per_page = per_slot.astype(dtype) if self.position.ndim == 1 else per_slot.sum(-1, dtype=dtype)
        if self.owned is None:
            return per_page
        return jnp.where(self.owned, per_page[..., None, :], jnp.zeros((), dtype)).sum(-1, dtype=dtype)

    def least(self, per_slot: Num[Array, "*slots"]) -> Num[Array, " kv_heads"]:
        """The smallest of each head's slots."""
        per_page = per_slot if self.position.ndim == 1 else per_slot.min(-1)
        return per_page if self.owned is None else jnp.where(self.owned, per_page, largest(per_page)).min(-1)

    def only(self, some: Bool[Array, "*slots"]) -> "Slots":
        """The same with those slots alone; the others count as empty."""
        return self._replace(position=jnp.where(some, self.position, EMPTY))

    def lowest(
        self, rank: Num[Array, "*slots"], count: PerHead, most: int | None = None, *further: Num[Array, "*slots"]
    ) -> Bool[Array, "*slots"]:
        """Which live slots are among the ``count`` of their head that rank lowest, among equals the oldest first.

        NaN is as low as -infinity. ``count`` may differ by head; ``most``, if given, is what none exceeds. Where two
        keys of a head may have one rank and one position, ``further`` numbers say which comes first.

        A few keys are found one by one (a policy on a budget loses one a step), many by sorting. Both are loops that
        make no trip when nothing is to be found; under `jax.vmap`, `jax.lax.cond` would compute both of its branches.
        """
        live = self.total(self.live)
        count = jnp.clip(jnp.broadcast_to(jnp.asarray(count, jnp.int32), live.shape), 0, live)
        keys = _ordered(rank), self.position, *further

        def some(found):
            hit = self.live & ~found[0] & (self.spread(found[1]) > 0)
            for key in keys:
                hit &= key == self.spread(self.least(jnp.where(hit, key, largest(key))))
            return found[0] | hit, found[1] - 1

        def many(found):  # sorts by what was found before, or XLA would sort ahead of the loop, whether it runs or not
            place = self._place(~self.live | found[0], *keys)
            return self.live & (place < self.spread(found[1])), 0 * count

        found = jnp.zeros_like(self.live), count
        if most is None or most > FEW:
            found = jax.lax.while_loop(lambda found: (found[1] > FEW).any(), many, found)
        return jax.lax.while_loop(lambda found: (found[1] > 0).any(), some, found)[0]

    def lowest_of_layer(self, rank: Num[Array, "*slots"], count: PerHead) -> Int[Array, " kv_heads"]:
        """How many of the ``count`` live slots of the layer that rank lowest belong to each head.

        Among equals the oldest key comes first, then that of the first head. NaN is as low as -infinity.
        """
        columns = (x.reshape(-1) for x in (~self.live, _ordered(rank), self.position, self.head))
        dead, _, _, head = jax.lax.sort(tuple(columns), num_keys=4)
        first = ~dead & (iota(head.size) < count)
        return jnp.zeros_like(self.total(self.live)).at[head].add(first.astype(jnp.int32))

    def neighbours(
        self, per_slot: Float[Array, "*slots"], radius: int, absent: float
    ) -> Float[Array, "neighbours *slots"]:
        """What a head's live keys hold that stand at most ``radius`` positions away, each slot's own key included.

        In no particular order, and filled up with ``absent`` to 2 ``radius`` + 1 of them.
        """
        position = jnp.where(self.live, self.position, largest(self.position))
        order = self._order(self.head, position)
        head, position, per_slot = (x.reshape(-1)[order] for x in (self.head, position, per_slot))
        index, found = iota(order.size), []
        for shift in range(-radius, radius + 1):
            other = jnp.clip(index + shift, 0, index.size - 1)
            near = (head[other] == head) & (jnp.abs(position[other] - position) <= radius)
            near &= (other == index + shift) & (position < largest(position))
            found.append(jnp.where(near, per_slot[other], absent))
        return self._restored(jnp.stack(found), order)

    def place(self) -> Int[Array, "*slots"]:
        """How many live keys of its head stand before each live key: its position within the cache."""
        return self._place(~self.live, self.position)

    def mean_over_heads(self, per_slot: Num[Array, "*slots"]) -> Num[Array, "*slots"]:
        """The mean, over the heads of the layer, of what each says of the token whose key a slot holds.

        It goes by position: heads may hold different tokens, in whatever slots. 0 stands for a head that does not hold
        the token, and for what is not a number (NaN), so that no head spoils the mean of the others. It is for
        decisions: no gradient goes through it.
        """
        if not jnp.issubdtype(per_slot.dtype, jnp.floating):
            per_slot = per_slot.astype(jnp.float32)
        per_slot = jax.lax.stop_gradient(jnp.where(jnp.isnan(per_slot), 0, per_slot))
        if self.owned is not None:
            return self._mean_by_position(per_slot, self.live, self.owned.shape[0])

        def by_position(found):  # sorts by what it carries, as in `lowest`
            return self._mean_by_position(per_slot, self.live & found[1], len(per_slot)), jnp.zeros((), bool)

        # As a rule all heads hold the same tokens in the same slots, and the loop makes no trip.
        alike = jnp.broadcast_to(per_slot.mean(0, keepdims=True), per_slot.shape)
        differ = (self.position != self.position[:1]).any()
        return jax.lax.while_loop(lambda found: found[1], by_position, (alike, differ))[0]

    def _mean_by_position(
        self, per_slot: Float[Array, "*slots"], live: Bool[Array, "*slots"], kv_heads: int
    ) -> Float[Array, "*slots"]:
        order = self._order(~live, self.position, self.head)  # the heads of a token side by side, in their order
        position, per_slot = (x.reshape(-1)[order] for x in (self.position, per_slot))
        first = jnp.searchsorted(jnp.where(position >= 0, position, largest(position)), position)
        same = [jnp.minimum(first + head, order.size - 1) for head in range(kv_heads)]
        parts = [jnp.where(position[index] == position, per_slot[index], 0) for index in same]
        return self._restored(jnp.stack(parts).mean(0), order)

    @property
    def head(self) -> Int[Array, "*slots"]:
        """Whose key each slot holds."""
        if self.owned is None:
            return jax.lax.broadcasted_iota(jnp.int32, self.position.shape, 0)
        return jnp.broadcast_to(self.spread(iota(self.owned.shape[0])), self.position.shape)

    def _place(self, *keys: Array) -> Int[Array, "*slots"]:
        """Each slot's place among those of its head, sorted by the first key, then by the second, and so on."""
        order = self._order(self.head, *keys)
        slots = self.total(jnp.ones_like(self.position))
        return self._restored(iota(order.size), order) - self.spread(jnp.cumsum(slots, dtype=jnp.int32) - slots)

    def _order(self, *keys: Array) -> Int[Array, " all_slots"]:
        index = iota(self.position.size)
        return jax.lax.sort((*(key.reshape(-1) for key in keys), index), num_keys=len(keys))[-1]

    def _restored(self, ordered: Shaped[Array, "*leading all_slots"], order: Int[Array, " all_slots"]) -> Array:
        """What stands in this order, slot by slot again."""
        return jnp.zeros_like(ordered).at[..., order].set(ordered).reshape(*ordered.shape[:-1], *self.position.shape)


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
    """

    protected: PerHead = 0
    recent: PerHead = 0
    most: PerHead | None = None
    needs: tuple[str, ...] = EVERYTHING
    positions: str = "original"
    whole_prompt: bool = False


def traits(policy: Any) -> Traits:
    """What a policy says of itself: its attributes of these names, and the defaults for those that it lacks.

    A policy around another has an attribute ``traits`` instead, see `corm_jax.policies.wrapper`.

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
      prompt: whether anybody said where the prompt ends.
      enough: whether there are slots for all tokens that will be read, though fewer than the policy protects keys.
    """

    policy: str
    prompt: bool = False
    enough: bool = False


class LayerCache(NamedTuple):
    """One layer's keys and values in a fixed number of slots, with the policy's state beside them.

    Position is data, slot is storage: a key may sit in any slot of its head, or of the pool. In a batch every leaf
    has a leading ``batch`` axis, and each row its own clock.

    Attributes:
      k, v: ``[*slots, head_dim]``, keys rotated at their positions, unless the policy counts ``positions`` within the
        cache. Values are finite, those of empty slots too: see `corm_jax.cache.insert`.
      position: int32 ``[*slots]``, `EMPTY` where no key is.
      state: the policy's state.
      seen: int32 scalar, tokens read so far.
      prompt: int32 scalar, how many there are when the prompt has been read; `ENDLESS` if nobody said.
      overflow: int32 ``[kv_heads]``, keys that went because no slot was free.
      head: int32 ``[pool]``, in a pool: whose key each slot holds. None in a rectangle. See `corm_jax.cache.paged` too.
      made: what is known of it without its arrays. None if that is nothing.
    """

    k: Float[Array, "*slots head_dim"]
    v: Float[Array, "*slots head_dim"]
    position: Int[Array, "*slots"]
    state: State
    seen: Int[Array, ""]
    prompt: Int[Array, ""]
    overflow: Int[Array, " kv_heads"]
    head: Int[Array, " pages"] | None = None
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


def largest(x: Array) -> Array:
    """What no finite number of this dtype exceeds."""
    limit = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    return jnp.asarray(limit(x.dtype).max, x.dtype)


def _ordered(rank: Array) -> Array:
    """A rank whose order is total: NaN is as low as -infinity. Infinities tie with what is largest and smallest."""
    if jnp.issubdtype(rank.dtype, jnp.floating):
        most = largest(rank)
        rank = jnp.clip(jnp.where(jnp.isnan(rank), -most, rank), -most, most)
    return rank


def iota(size: int) -> Int[Array, " {size}"]:
    """0, 1, ... in 32 bits."""
    return jnp.arange(size, dtype=jnp.int32)


def narrow(tree: PyTree[Any]) -> PyTree[Any]:
    """Arrays of 64-bit numbers as of 32 bits, as JAX has them unless ``JAX_ENABLE_X64`` is set."""

    def one(x):
        wide = {"int64": jnp.int32, "uint64": jnp.uint32, "float64": jnp.float32}
        if not isinstance(x, jax.Array | np.generic | np.ndarray) or jax.typeof(x).weak_type:
            return x  # Python's numbers turn into what they meet
        return x.astype(wide[x.dtype.name]) if x.dtype.name in wide else x

    return jax.tree.map(one, tree)


def broadcasts(function: Callable) -> Callable:
    """Makes a function one in which ranks may differ, whatever ``jax_numpy_rank_promotion`` says.

    Leading axes broadcast over the slots here, on purpose, and in everybody's policies. The setting stays what it is
    around the call.
    """

    @wraps(function)
    def allowed(*arguments, **options):
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments, **options)

    return allowed
