"""The data that policies, caches and models exchange: small pytrees, with their axes named.

One layer of one sequence is the unit throughout; batches come from `jax.vmap`. Axis names, here and everywhere:
``batch layer kv_heads group tokens slots head_dim vocab``. ``*slots`` stands for the slot axes of whatever layout holds
the cache: ``kv_heads capacity`` in the rectangular one. Positions count from 0; the clock ``seen`` (the paper's t)
is the number of tokens read so far, the current one included.
"""

from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, Shaped

EMPTY = -1
"""The position of a slot that holds no key. Nothing else marks a slot as free."""

ENDLESS = 2**31 - 1
"""The length of a prompt of which nobody said where it ends: all that is read belongs to it."""

FEW = 8
"""Up to so many keys are cheaper found one by one than by sorting."""

EVERYTHING = ("attention", "keys")
"""What a policy may need beside positions: attention probabilities, and the keys themselves."""

State: TypeAlias = PyTree[Any]
"""What a policy remembers: a pytree of arrays that each end in the slot axes, ``[..., *slots]``."""


PerHead: TypeAlias = Any
"""A number, or one for each head (``[kv_heads]``): of Python, NumPy or JAX, and possibly traced."""


class CacheSpec(NamedTuple):
    """The static shape of one layer's cache for one sequence: ``k, v [kv_heads, capacity, head_dim]``."""

    kv_heads: int
    capacity: int
    head_dim: int
    dtype: Any = jnp.float32

    @property
    def slots(self) -> tuple[int, int]:
        """The slot axes, the shape of everything a policy keeps per slot."""
        return self.kv_heads, self.capacity


class Slots(NamedTuple):
    """The slots of one layer of one sequence, as a policy sees them.

    A policy computes slot by slot on arrays that end in ``*slots``. Where it needs a head as a whole it goes through
    `spread` and `total`, so that it never has to know how heads share the storage.

    Attributes:
      position: int32 ``[*slots]``, where in the sequence the slot's key stands; `EMPTY` if there is none.
      seen: int32 scalar, the clock: tokens read so far.
      prompt: int32 scalar, the clock at which the prompt ends; `ENDLESS` if nobody said.
    """

    position: Int[Array, "kv_heads capacity"]
    seen: Int[Array, ""]
    prompt: Int[Array, ""]

    @property
    def live(self) -> Bool[Array, "kv_heads capacity"]:
        """Which slots hold a key."""
        return self.position >= 0

    def newest(self, recent: PerHead) -> Bool[Array, "kv_heads capacity"]:
        """Which slots hold one of the newest ``recent`` keys (a number, or one for each head)."""
        return self.position >= self.seen - self.spread(recent)

    def spread(self, per_head: PerHead | Num[Array, "... kv_heads"]) -> Num[Array, "..."]:
        """A number, or ``[..., kv_heads]``, in a shape that broadcasts against ``[*slots]``."""
        per_head = jnp.asarray(per_head)
        return per_head[..., None] if per_head.ndim else per_head

    def only(self, some: Bool[Array, "kv_heads capacity"]) -> "Slots":
        """The same with those slots alone; the others count as empty."""
        return self._replace(position=jnp.where(some, self.position, EMPTY))

    def lowest(self, rank: Num[Array, "kv_heads capacity"], count: PerHead) -> Bool[Array, "kv_heads capacity"]:
        """Which live slots are among the ``count`` of their head that rank lowest, among equals the oldest first.

        ``count`` may differ by head. A few are found one by one (a policy on a budget loses one a step), many by
        sorting. Both are loops that need not run at all, which `jax.lax.cond` under `jax.vmap` cannot be.
        """
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), self.position.shape[:1])
        count = jnp.clip(count, 0, self.total(self.live))

        def some(found):
            candidates = self.live & ~found[0]
            lowest = jnp.where(candidates, rank, largest(rank)).min(-1, keepdims=True)
            tied = jnp.where(candidates & (rank == lowest), self.position, largest(self.position))
            hit = candidates & (tied == tied.min(-1, keepdims=True)) & (self.spread(found[1]) > 0)
            return found[0] | hit, found[1] - 1

        def many(_):
            order = _order(~self.live, rank, self.position)
            place = _restored(jax.lax.broadcasted_iota(jnp.int32, order.shape, 1), order)
            return self.live & (place < self.spread(count)), jnp.zeros_like(count)

        found = jnp.zeros_like(self.live), count
        found = jax.lax.while_loop(lambda found: (found[1] > FEW).any(), many, found)
        return jax.lax.while_loop(lambda found: (found[1] > 0).any(), some, found)[0]

    def lowest_of_layer(self, rank: Num[Array, "kv_heads capacity"], count: PerHead) -> Int[Array, " kv_heads"]:
        """How many of the ``count`` live slots of the layer that rank lowest belong to each head.

        Among equals the oldest key comes first, then that of the first head.
        """
        head = jax.lax.broadcasted_iota(jnp.int32, self.position.shape, 0)
        columns = (x.reshape(-1) for x in (~self.live, rank, self.position, head))
        dead, _, _, head = jax.lax.sort(tuple(columns), num_keys=4)
        first = ~dead & (jnp.arange(head.size) < count)
        return jnp.zeros(self.position.shape[0], jnp.int32).at[head].add(first.astype(jnp.int32))

    def neighbours(
        self, per_slot: Float[Array, "kv_heads capacity"], radius: int, absent: float
    ) -> Float[Array, "neighbours kv_heads capacity"]:
        """What a head's live keys hold that stand at most ``radius`` positions away, each slot's own key included.

        In no particular order, and filled up with ``absent`` to 2 ``radius`` + 1 of them.
        """
        position = jnp.where(self.live, self.position, largest(self.position))
        order = _order(position)
        position, per_slot = (jnp.take_along_axis(x, order, 1) for x in (position, per_slot))
        index = jnp.arange(position.shape[1])
        found = []
        for shift in range(-radius, radius + 1):
            other = jnp.clip(index + shift, 0, index.size - 1)
            near = (jnp.abs(position[:, other] - position) <= radius) & (position < largest(position))
            found.append(jnp.where(near & (other == index + shift), per_slot[:, other], absent))
        return _restored(jnp.stack(found), order)

    def place(self) -> Int[Array, "kv_heads capacity"]:
        """How many live keys of its head stand before each live key: its position within the cache."""
        order = _order(jnp.where(self.live, self.position, largest(self.position)))
        return _restored(jax.lax.broadcasted_iota(jnp.int32, order.shape, 1), order)

    def mean_over_heads(self, per_slot: Num[Array, "kv_heads capacity"]) -> Num[Array, "kv_heads capacity"]:
        """The mean over the heads of a layer, for policies whose heads all keep the same tokens."""
        return jnp.broadcast_to(per_slot.mean(0, keepdims=True), per_slot.shape)

    def total(self, per_slot: Shaped[Array, "*leading kv_heads capacity"]) -> Num[Array, "*leading kv_heads"]:
        """The sum over each head's slots."""
        return per_slot.sum(-1)


class Observation(NamedTuple):
    """What the newest queries saw: their attention over the slots, before any eviction.

    Probabilities are kept as softmax computes them, ``alpha = weights / total``. Comparisons such as alpha >= 1/n are
    then exact where ties are (n equal logits give weights 1 and total n), and a policy that needs only comparisons
    costs no second pass over the exponentials. A fused attention that returns the logsumexp fits as
    ``weights = exp(logits - logsumexp), total = 1``. Queries that only pad a ragged batch have zero weights.

    Attributes:
      weights: float32 ``[group, tokens, *slots]``.
      total: float32, broadcastable against ``weights``: the sum over the slots of each head.
      visible: bool ``[tokens, *slots]``, which slots the query could attend to.
      seen: int32, broadcastable against ``visible``: the clock at each query (its position + 1).
      keys: ``[*slots, head_dim]``, what the slots hold; None where a trace does not tell.
    """

    weights: Float[Array, "group tokens kv_heads capacity"]
    total: Float[Array, "group tokens kv_heads 1"]
    visible: Bool[Array, "tokens kv_heads capacity"]
    seen: Int[Array, "tokens 1 1"]
    keys: Float[Array, "kv_heads capacity head_dim"] | None = None

    @property
    def probability(self) -> Float[Array, "group tokens kv_heads capacity"]:
        """alpha, the attention probabilities."""
        return self.weights / self.total


@runtime_checkable
class Policy(Protocol):
    """An eviction rule: hyperparameters in a frozen dataclass that is a pytree, and four pure functions.

    `corm_jax.policy` makes such a class. Numbers such as a window are leaves: they may be traced, mapped over by
    `jax.vmap`, and arrays ``[kv_heads]`` where a scalar was. Choices are static metadata. The cache calls, for each
    chunk of newest tokens: `rank` while there are fewer free slots than new keys, `observe` after attention, then
    `retain`.

    The rest is voluntary:

    - ``most``: how many keys of a head stay at most, after which caches are sized.
    - ``recent``: a promise that the newest so many stay, to which `simulator.testing` holds the policy.
    - ``needs``: what it looks at beside positions, of `EVERYTHING`. `simulator.testing` holds it to that. What is not
      needed costs nothing: it is not computed under `jax.jit`.
    - ``whole_prompt``: true if it keeps every key until the prompt has been read. It has to be told where that is.
    - ``for_layer(layer, layers)``: the policy of one layer of so many, where they differ.
    - ``positions``: ``"cache"`` if keys are to be rotated by their place among those of their head that are live,
      not by their place in the text.
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
        """Who goes first when slots run out: the lowest, among equals the oldest key."""
        ...


class LayerCache(NamedTuple):
    """One layer's keys and values in a rectangle of slots, with the policy's state beside them.

    Position is data, slot is storage: a key may sit in any slot of its head. In a batch every leaf has a leading
    ``batch`` axis, and each row its own clock.

    Attributes:
      k, v: ``[kv_heads, capacity, head_dim]``, keys rotated at their positions, unless the policy counts ``positions``
        within the cache.
      position: int32 ``[kv_heads, capacity]``, `EMPTY` where no key is.
      state: the policy's state.
      seen: int32 scalar, tokens read so far.
      prompt: int32 scalar, how many there are when the prompt has been read; `ENDLESS` if nobody said.
      overflow: int32 ``[kv_heads]``, keys that went because no slot was free.
    """

    k: Float[Array, "kv_heads capacity head_dim"]
    v: Float[Array, "kv_heads capacity head_dim"]
    position: Int[Array, "kv_heads capacity"]
    state: State
    seen: Int[Array, ""]
    prompt: Int[Array, ""]
    overflow: Int[Array, " kv_heads"]


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
    """What no number of this dtype exceeds."""
    limit = jnp.iinfo(x.dtype).max if jnp.issubdtype(x.dtype, jnp.integer) else jnp.inf
    return jnp.asarray(limit, x.dtype)


def _order(*keys: Array) -> Int[Array, "kv_heads capacity"]:
    """The slots of each head, sorted by the first key, then by the second, and so on."""
    index = jax.lax.broadcasted_iota(jnp.int32, keys[0].shape, 1)
    return jax.lax.sort((*keys, index), num_keys=len(keys), dimension=1)[-1]


def _restored(ordered: Shaped[Array, "... capacity"], order: Int[Array, "kv_heads capacity"]) -> Array:
    """What stands in this order, slot by slot again."""
    head = jax.lax.broadcasted_iota(jnp.int32, order.shape, 0)
    return ordered.at[..., head, order].set(ordered)
