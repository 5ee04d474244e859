"""The slots of one layer as a policy sees them: their heads, their keys, and the keys with the lowest scores.

Selection takes a fixed number of passes over the slots, and does not sort: a few keys are found one by one, many by a
threshold, whose bits are found two at a time.
"""

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from corm_jax.core.arrays import EMPTY, anywhere, iota, largest, narrow, ordered, varying
from corm_jax.core.layout import Apart

FEW = 4
"""Up to this many keys are found one by one."""

PerHead: TypeAlias = Any
"""A number, or one for each head: of Python, NumPy or JAX, and possibly traced.

``[kv_heads]`` for one layer. A policy for a whole model may have ``[layers, kv_heads]``:
`corm_jax.core.capacity.per_layer`.
"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["position", "seen", "prompt", "layout", "twin", "place"],
    meta_fields=["reading", "arrived"],
)
@dataclass(frozen=True)
class Slots:
    """The slots of one layer of one sequence, as a policy sees them.

    A policy computes slot by slot on arrays that end in ``*slots``. For what concerns a head as a whole it calls
    `broadcast`, `sum_per_head` and the methods below, so that it does not depend on how heads share the storage.

    Attributes:
      position: int32 ``[*slots]``, where in the sequence the slot's key stands; `EMPTY` if there is none.
      seen: int32 scalar, the clock: tokens read so far.
      prompt: int32 scalar, the clock at which the prompt ends; `ENDLESS` if that is unknown.
      layout: which head each slot belongs to.
      twin, place: int32 ``[kv_heads, *slots]`` and ``[*slots]``, or None, see `corm_jax.core.types.LayerCache`.
      reading: whether the prompt may still be read, or end in this step. Static: later steps skip the work that is done
        at the end of a prompt.
      arrived: how many keys of a head were added at most since the policy last evicted all that it wanted to; None if
        unknown. Static: a budget that held before then evicts at most so many. A wrapper that keeps keys which the
        policy inside would evict sets None.
    """

    position: Any  # unchecked, since JAX builds such objects of whatever it has
    seen: Any
    prompt: Any
    layout: Any
    twin: Any = None
    place: Any = None
    reading: bool = True
    arrived: int | None = None

    @property
    def live(self) -> Bool[Array, "*slots"]:
        """Which slots hold a key."""
        return self.position >= 0

    @property
    def kv_heads(self) -> int:
        """How many heads there are: of the layer, or of the part of it that a device has."""
        return self.layout.kv_heads(self.position.shape[0])

    @property
    def head(self) -> Int[Array, "*slots"]:
        """The head whose key each slot holds."""
        return self.layout.heads(*self.position.shape)

    def newest(self, recent: PerHead) -> Bool[Array, "*slots"]:
        """Which slots hold one of the newest ``recent`` keys (a number, or one for each head)."""
        return self.position >= self.seen - self.broadcast(recent)

    def broadcast(self, per_head: PerHead | Shaped[Array, "... kv_heads"]) -> Shaped[Array, "..."]:
        """A number or truth value, or ``[..., kv_heads]`` of them, in a shape that broadcasts against ``[*slots]``."""
        per_head = jnp.asarray(narrow(per_head))
        if per_head.dtype == bool:
            return self.broadcast(per_head.astype(jnp.int32)) > 0
        return self.layout.broadcast(per_head) if per_head.ndim else per_head

    def sum_per_head(self, per_slot: Shaped[Array, "*leading_and_slots"]) -> Num[Array, "*leading kv_heads"]:
        """The sum over each head's slots; of truth values their number, int32."""
        return self.layout.sum_per_head(per_slot.astype(jnp.int32) if per_slot.dtype == bool else per_slot)

    def min_per_head(self, per_slot: Num[Array, "*leading_and_slots"]) -> Num[Array, "*leading kv_heads"]:
        """The smallest of each head's slots."""
        return self.layout.min_per_head(per_slot)

    def restrict(self, some: Bool[Array, "*slots"]) -> "Slots":
        """The same slots, of which only ``some`` count as live."""
        return replace(self, position=jnp.where(some, self.position, EMPTY))

    def lowest(
        self, score: Num[Array, "*slots"], count: PerHead, most: int | None = None, *further: Int[Array, "*slots"]
    ) -> Bool[Array, "*slots"]:
        """Which live slots are among the ``count`` of their head that score lowest, among equals the oldest first.

        NaN is as low as -infinity. ``count`` may differ by head; ``most``, if given, is an upper bound of it. If two
        keys of a head can have the same score and the same position, ``further`` numbers, from 0 up, break the tie.
        """
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), (self.kv_heads,))
        if most is not None and most <= FEW:
            return self._one_by_one(count, most, ordered(score), self.position, *further)
        # Whole numbers in a decode step: no loop. For floats a loop carries one copy of the score; without it XLA may
        # compute the score several times, rounded differently.
        straight = self.arrived == 1 and not self.reading and not jnp.issubdtype(score.dtype, jnp.floating)
        rest, found = self.live, jnp.zeros_like(self.live)
        for key, bits in ((ordered(score), 32), (self.position, 31), *((one, 31) for one in further)):
            below, tied = self._below(key, rest, count, bits, straight)
            found, rest, count = found | below, tied, count - self.sum_per_head(below)
        return found | (rest & (self.broadcast(count) > 0))

    def _one_by_one(self, count, most, *keys):
        def one(nth, found):
            some = self.live & ~found & (self.broadcast(count) > nth)
            return found | (some & self.layout.first(*(jnp.where(some, key, largest(key)) for key in keys)))

        none = varying(jnp.zeros_like(self.live), count, *keys)
        return one(0, none) if most == 1 else jax.lax.fori_loop(0, most, one, none)

    def _below(self, key, among, count, bits, straight):
        """Slots whose key is below the ``count``-th smallest of their head ``among`` some, and slots that equal it.

        For a head with fewer than ``count`` slots the first set is empty and the second has all of them.
        """
        key = jax.lax.bitcast_convert_type(key, jnp.uint32)
        key = key ^ jnp.uint32(1 << 31) if bits == 32 else key
        some = self.broadcast((count > 0) & (self.sum_per_head(among) >= count))

        def two_bits(step, carry):
            bound, *_ = carry
            shift = jnp.uint32(30) - 2 * jnp.asarray(step, jnp.uint32)
            candidates = bound + (jnp.arange(1, 4, dtype=jnp.uint32)[:, None] << shift)  # no carry: these bits are 0
            smaller = self.sum_per_head(among & (key < self.broadcast(candidates)))
            bound = bound + ((smaller < count).sum(0, dtype=jnp.uint32) << shift)
            here = self.broadcast(bound)
            return bound, among & (key < here) & some, among & ((key == here) | ~some)

        start = varying((jnp.zeros(self.kv_heads, jnp.uint32), among, among), key, among, count)
        if straight:
            return reduce(lambda carry, step: two_bits(step, carry), range(16), start)[1:]
        return jax.lax.fori_loop(0, 16, two_bits, start)[1:]

    def lowest_of_layer(self, score: Num[Array, "*slots"], count: PerHead) -> Int[Array, " kv_heads"]:
        """How many of the ``count`` live slots of the layer that score lowest belong to each head.

        Among equals the oldest key comes first, then that of the first head. NaN is as low as -infinity.
        """
        position, score, head = (x.reshape(1, -1) for x in (self.position, score, self.head))
        layer = replace(self, position=position, layout=Apart())
        return self.sum_per_head(layer.lowest(score, count, None, head).reshape(self.position.shape))

    def neighbours(
        self, per_slot: Float[Array, "*slots"], radius: int, absent: float
    ) -> Float[Array, "neighbours *slots"]:
        """The values of the head's live keys that are at most ``radius`` positions away, each slot's own key included.

        They are in no particular order, and filled up with ``absent`` to 2 ``radius`` + 1 values.
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

    def mean_over_heads(self, per_slot: Num[Array, "*slots"]) -> Num[Array, "*slots"]:
        """The mean, over the heads of the layer, of the values that belong to the same token.

        Tokens are matched by position: heads may hold different tokens, in any slots. A head that does not hold the
        token counts as 0, and so does NaN, so that one head cannot make the mean of the others NaN. The result is for
        decisions: it has no gradient.
        """
        if not jnp.issubdtype(per_slot.dtype, jnp.floating):
            per_slot = per_slot.astype(jnp.float32)
        per_slot = jax.lax.stop_gradient(jnp.where(jnp.isnan(per_slot), 0, per_slot))
        if self.twin is not None:
            position = self.position.reshape(-1).at[self.twin].get(mode="fill", fill_value=EMPTY)
            said = per_slot.reshape(-1).at[self.twin].get(mode="fill", fill_value=0)
            return jnp.where(position == self.position, said, 0).mean(0)

        def by_position():
            order = self._order(~self.live, self.position, self.head)  # the heads of a token side by side
            position, here = (x.reshape(-1)[order] for x in (self.position, per_slot))
            first = jnp.searchsorted(jnp.where(position >= 0, position, largest(position)), position)
            same = [jnp.minimum(first + head, order.size - 1) for head in range(self.kv_heads)]
            parts = [jnp.where(position[index] == position, here[index], 0) for index in same]
            return self._restored(jnp.stack(parts).mean(0), order)

        def by_slot():  # the usual case: all heads hold the same tokens in the same slots
            return jnp.broadcast_to(per_slot.mean(0, keepdims=True), per_slot.shape)

        return jax.lax.cond(anywhere(~self.layout.aligned(self.position)), by_position, by_slot)

    def _order(self, *keys: Array) -> Int[Array, " all_slots"]:
        index = iota(self.position.size)
        return jax.lax.sort((*(key.reshape(-1) for key in keys), index), num_keys=len(keys))[-1]

    def _restored(self, ordered_: Shaped[Array, "*leading all_slots"], order: Int[Array, " all_slots"]) -> Array:
        """Values in this order, back in the order of the slots."""
        found = jnp.zeros_like(ordered_).at[..., order].set(ordered_)
        return found.reshape(*ordered_.shape[:-1], *self.position.shape)
