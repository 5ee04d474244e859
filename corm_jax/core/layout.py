"""Layouts: which head each slot of a layer belongs to, and everything that depends on it.

Slots are in stores, ``[stores, slots]``: each head has a store of its own, or several heads share one. What depends on
this is here, behind one protocol: reductions over a head's slots, the broadcast of a number per head to its slots, the
products of attention, and the arrangement of keys for many queries. Caches, attention, policies and replay use the
protocol, and work with any layout.

======== ============================ ======== ============================================================
layout   head of a slot               stores   used for
======== ============================ ======== ============================================================
`Apart`  that of its store            kv_heads caches with slots for each head, and replay
`Shared` ``whose [stores, slots]``    any      pools: one store a layer, or one for each device
`Paged`  ``head [stores]``            any      chunks of queries on a pool whose keys are gathered by head
======== ============================ ======== ============================================================

A layout describes its stores one by one. So it is also right for some of the stores, on a device that has a part of the
heads.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from corm_jax.core.arrays import first_by, iota, largest, smallest

PAGE = 128
"""Slots of a page, unless the cache is small. Does not change results."""

MANY, PART = 40, 0.6
"""From this many pages on, only this part of them is attended to while that is enough. Does not change results."""


def product(axes: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum with sums in float32: of float32 factors in full precision, or of 16-bit factors of one dtype.

    By default a GPU rounds float32 factors to the 11 bits of TF32, which changes about one verdict of alpha >= 1/t in
    20,000.
    """
    if x.dtype != y.dtype or x.dtype.itemsize != 2:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=jnp.float32)


def weighted(axes: str, weights: Float[Array, "..."], v: Float[Array, "..."]) -> Float[Array, "..."]:
    """A weighted sum of values. Weights are converted to the dtype of the values if that has 16 bits."""
    return product(axes, weights.astype(v.dtype) if v.dtype.itemsize == 2 else weights, v)


class Layout:
    """The protocol of all layouts. ``stores`` and ``slots`` are those of the arrays that are given."""

    def kv_heads(self, stores: int) -> int:
        """How many heads this many stores belong to."""
        raise NotImplementedError

    def broadcast(self, per_head: Num[Array, "*leading kv_heads"]) -> Num[Array, "*leading stores slots_or_1"]:
        """A number for each head, broadcast to its slots."""
        raise NotImplementedError

    def sum_per_head(self, per_slot: Num[Array, "*leading stores slots"]) -> Num[Array, "*leading kv_heads"]:
        """The sum over each head's slots."""
        raise NotImplementedError

    def min_per_head(self, per_slot: Num[Array, "*leading stores slots"]) -> Num[Array, "*leading kv_heads"]:
        """The smallest of each head's slots."""
        raise NotImplementedError

    def most(self, per_slot: Num[Array, "*leading stores slots"]) -> Num[Array, "*leading kv_heads"]:
        """The largest of each head's slots."""
        raise NotImplementedError

    def first(self, *keys: Int[Array, "stores slots"]) -> Bool[Array, "stores slots"]:
        """The first slot of each head in the order of the first key, then the next, then the place in the store.

        The keys are computed once: if XLA computed one twice, rounded differently, no slot would be found.
        """
        raise NotImplementedError

    def heads(self, stores: int, slots: int) -> Int[Array, "stores slots"]:
        """The head that each slot belongs to."""
        raise NotImplementedError

    def aligned(self, position: Int[Array, "stores slots"]) -> Bool[Array, ""]:
        """Whether slot i holds the same token in every head, for all i."""
        raise NotImplementedError

    def given(self, slot: Int[Array, "stores newcomers"], head: Int[Array, "stores newcomers"]) -> "Layout":
        """The layout after these slots of each store were given to these heads. Indices out of bounds are ignored."""
        raise NotImplementedError

    def logits(
        self, q: Float[Array, "tokens kv_heads group head_dim"], k: Float[Array, "stores slots head_dim"]
    ) -> Float[Array, "group tokens stores slots"]:
        """``q . k`` of each slot's key with the queries of its own head, float32."""
        raise NotImplementedError

    def weighted(
        self, weights: Float[Array, "group tokens stores slots"], v: Float[Array, "stores slots head_dim"]
    ) -> Float[Array, "tokens kv_heads group head_dim"]:
        """The sum of each head's values by their weights, float32."""
        raise NotImplementedError

    def merged(self, each: int) -> "Layout":
        """The layout in which the ``each`` heads that share a store count as one head."""
        raise NotImplementedError

    def enlarged(self, slots: int) -> "Layout":
        """The layout after ``slots`` slots were added at the end of each store; removed, if the number is negative."""
        raise NotImplementedError

    def opened(self, position: Int[Array, "stores slots"], part: float = 1.0) -> "Opened":
        """The live keys, arranged for many queries; with ``part`` below 1, in only that part of the pages."""
        raise NotImplementedError

    def few(self, position: Int[Array, "stores slots"]) -> Bool[Array, ""] | None:
        """Whether the live keys fit into the `PART` of the pages; None if all pages are always attended to."""
        return None


class Opened(NamedTuple):
    """Keys arranged for many queries.

    Attributes:
      layout: in which every store belongs to one head.
      take: ``[..., stores, slots] -> [..., stores', slots']``; with ``rows=True`` both have one more axis at the end.
        Entries without a slot are ``absent``.
      back: ``[..., stores', slots'] -> [..., stores, slots]``; the result for empty slots is arbitrary.
    """

    layout: Any
    take: Any
    back: Any


def as_it_is(layout: Layout) -> Opened:
    """Keys that are not moved for many queries."""
    return Opened(layout, lambda x, absent=0, rows=False: x, lambda x: x)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Apart(Layout):
    """Every head has a store of its own."""

    def kv_heads(self, stores):
        return stores

    def broadcast(self, per_head):
        return per_head[..., None]

    def sum_per_head(self, per_slot):
        return per_slot.sum(-1, dtype=per_slot.dtype)

    def min_per_head(self, per_slot):
        return per_slot.min(-1)

    def most(self, per_slot):
        return per_slot.max(-1)

    def first(self, *keys):
        slot = jnp.broadcast_to(iota(keys[0].shape[1]), keys[0].shape)
        return slot == first_by(*keys, slot)[-1][:, None]

    def heads(self, stores, slots):
        return jax.lax.broadcasted_iota(jnp.int32, (stores, slots), 0)

    def aligned(self, position):
        return (position == position[:1]).all()

    def given(self, slot, head):
        return self

    def merged(self, each):
        return self  # which has no store for several

    def logits(self, q, k):
        tokens, kv_heads, group, head_dim = q.shape
        rows = q.transpose(1, 2, 0, 3).reshape(kv_heads, group * tokens, head_dim)  # one matrix: faster on a CPU
        return product("srd,scd->src", rows, k).swapaxes(0, 1).reshape(group, tokens, kv_heads, -1)

    def weighted(self, weights, v):
        group, tokens, stores, slots = weights.shape
        rows = weights.transpose(2, 0, 1, 3).reshape(stores, group * tokens, slots)
        return weighted("src,scd->srd", rows, v).reshape(stores, group, tokens, -1).transpose(2, 0, 1, 3)

    def enlarged(self, slots):
        return self

    def opened(self, position, part=1.0):
        return as_it_is(self)


@partial(jax.tree_util.register_dataclass, data_fields=["head"], meta_fields=["count"])
@dataclass(frozen=True)
class Paged(Layout):
    """Every store, here a page, belongs to one head; a head may have any number of them."""

    head: Any  # int32 [stores]; unchecked, since JAX builds such objects of whatever it has
    count: int

    def kv_heads(self, stores):
        return self.count

    @property
    def owned(self) -> Bool[Array, "kv_heads stores"]:
        """Whether each page belongs to each head."""
        return self.head == iota(self.count)[:, None]

    def broadcast(self, per_head):
        return per_head[..., self.head, None]

    def sum_per_head(self, per_slot):
        per_page = per_slot.sum(-1, dtype=per_slot.dtype)
        return jnp.where(self.owned, per_page[..., None, :], 0).sum(-1, dtype=per_slot.dtype)

    def min_per_head(self, per_slot):
        per_page = per_slot.min(-1)[..., None, :]
        return jnp.where(self.owned, per_page, largest(per_page)).min(-1)

    def most(self, per_slot):
        per_page = per_slot.max(-1)[..., None, :]
        return jnp.where(self.owned, per_page, smallest(per_page)).max(-1)

    def first(self, *keys):
        slot = jnp.broadcast_to(iota(keys[0].shape[1]), keys[0].shape)
        *of_page, slots = first_by(*keys, slot)
        page = jnp.broadcast_to(iota(self.head.size), self.owned.shape)
        pages = first_by(*(jnp.where(self.owned, key, largest(key)) for key in of_page), page)[-1]
        return (self.owned & (page == pages[:, None])).any(0)[:, None] & (slot == slots[:, None])

    def heads(self, stores, slots):
        return jnp.broadcast_to(self.head[:, None], (stores, slots))

    def aligned(self, position):
        return jnp.asarray(False)

    def merged(self, each):
        return Paged(self.head // each, self.count // each)

    def logits(self, q, k):
        tokens, kv_heads, group, head_dim = q.shape
        rows = q.transpose(1, 2, 0, 3).reshape(kv_heads, group * tokens, head_dim)
        # On a CPU page by page: XLA would fuse the rotation of the queries into a gather, once for every page.
        one_by_one = partial(jax.lax.map, lambda head: rows[head])
        rows = jax.lax.platform_dependent(self.head, cpu=one_by_one, default=lambda head: rows[head])
        return product("prd,pcd->prc", rows, k).reshape(-1, group, tokens, k.shape[1]).transpose(1, 2, 0, 3)

    def weighted(self, weights, v):
        group, tokens, pages, slots = weights.shape
        rows = weights.transpose(2, 0, 1, 3).reshape(pages, group * tokens, slots)
        each = weighted("prc,pcd->prd", rows, v)
        # Not a product with a matrix of 0 and 1, which would spread NaN to other heads. A CPU sums over a middle axis
        # very slowly.
        found = jax.lax.platform_dependent(
            each,
            cpu=lambda each: jax.ops.segment_sum(each, self.head, self.count),
            default=lambda each: jnp.where(self.owned[..., None, None], each, 0).sum(1),
        )
        return found.reshape(self.count, group, tokens, -1).transpose(2, 0, 1, 3)


@partial(jax.tree_util.register_dataclass, data_fields=["whose"], meta_fields=["each"])
@dataclass(frozen=True)
class Shared(Layout):
    """Any head of a store may use any of its slots. All stores have equally many heads, which follow each other.

    Attributes:
      whose: int32 ``[stores, slots]``, the head of each slot, counted from the first head of its store.
      each: how many heads share a store.
    """

    whose: Any
    each: int

    def kv_heads(self, stores):
        return self.each * stores

    @property
    def owned(self) -> Bool[Array, "each stores slots"]:
        """Which slots belong to the first, the second, ... of the heads of their store."""
        return self.whose == iota(self.each)[:, None, None]

    def broadcast(self, per_head):
        """By selection: a sum over a mask would be a separate launch, and gathers are slow on a CPU."""
        shape = *per_head.shape[:-1], *self.whose.shape
        per_store = per_head.reshape(*per_head.shape[:-1], self.whose.shape[-2], -1, 1)
        each = (jnp.broadcast_to(per_store[..., one, :], shape) for one in range(per_store.shape[-2]))
        return jax.lax.select_n(jnp.broadcast_to(self.whose, shape), *each)

    def sum_per_head(self, per_slot):
        return self._by_head(jnp.where(self.owned, per_slot[..., None, :, :], 0).sum(-1, dtype=per_slot.dtype))

    def min_per_head(self, per_slot):
        return self._by_head(jnp.where(self.owned, per_slot[..., None, :, :], largest(per_slot)).min(-1))

    def most(self, per_slot):
        return self._by_head(jnp.where(self.owned, per_slot[..., None, :, :], smallest(per_slot)).max(-1))

    def first(self, *keys):
        slot = jnp.broadcast_to(iota(keys[0].shape[1]), self.owned.shape)
        slots = first_by(*(jnp.where(self.owned, key, largest(key)) for key in keys), slot)[-1]
        return (self.owned & (slot == slots[..., None])).any(0)

    def _by_head(self, each):  # [..., each, stores] -> [..., kv_heads]
        return each.swapaxes(-1, -2).reshape(*each.shape[:-2], -1)

    def heads(self, stores, slots):
        return self.whose + self.each * iota(stores)[:, None]

    def aligned(self, position):
        return jnp.asarray(False)

    def given(self, slot, head):
        stores, new = len(slot), head - self.each * iota(len(slot))[:, None]
        if slot.shape[1] > self.each:  # more than a token
            return replace(self, whose=self.whose.at[iota(stores)[:, None], slot].set(new, mode="drop"))
        whose = self.whose
        for one in range(slot.shape[1]):
            whose = jnp.where(iota(whose.shape[1]) == slot[:, one, None], new[:, one, None], whose)
        return replace(self, whose=whose)

    def merged(self, each):
        return Apart()

    def logits(self, q, k):
        """Every head of a store against all of its slots; each key is read once."""
        tokens, _, group, head_dim = q.shape
        stores, slots, _ = k.shape
        rows = q.reshape(tokens, stores, -1, group, head_dim).transpose(1, 2, 3, 0, 4)
        every = product("scd,srd->scr", k, rows.reshape(stores, -1, head_dim))  # keys first: faster on a CPU
        every = every.reshape(stores, slots, self.each, group * tokens)
        own = jnp.take_along_axis(every, self.whose[..., None, None], 2, mode="promise_in_bounds")
        return own.reshape(stores, slots, group, tokens).transpose(2, 3, 0, 1)

    def weighted(self, weights, v):
        group, tokens, stores, slots = weights.shape
        own = jnp.where(self.owned[:, None, None], weights, 0)  # [each, group, tokens, stores, slots]
        rows = own.transpose(3, 0, 1, 2, 4).reshape(stores, -1, slots)
        found = weighted("src,scd->srd", rows, v).reshape(self.each * stores, group, tokens, -1)
        return found.transpose(2, 0, 1, 3)

    def enlarged(self, slots):
        size = self.whose.shape[-1] + slots
        return replace(self, whose=jnp.pad(self.whose, ((0, 0), (0, max(slots, 0))))[:, :size])

    def _paged(self, position):
        """Pages, slots of a page, which slots hold a key of each head, and where each head's pages end."""
        pool, kv_heads = position.size, self.kv_heads(len(position))
        size = min(PAGE, max(pool // kv_heads // 8, 1))
        pages = pool // size + kv_heads  # enough, however slots are shared out: one page a head is not full
        owned = (self.heads(*position.shape) == iota(kv_heads)[:, None, None]) & (position >= 0)
        owned = owned.reshape(kv_heads, pool)
        until = jnp.cumsum(-(-owned.sum(-1, dtype=jnp.int32) // size), dtype=jnp.int32)
        return pages, size, owned, until

    def few(self, position):
        pages, *_, until = self._paged(position)
        return until[-1] <= int(PART * pages) if pages >= MANY else None

    def opened(self, position, part=1.0):
        """The live keys gathered into pages that each belong to one head."""
        pool, kv_heads = position.size, self.kv_heads(len(position))
        pages, size, owned, until = self._paged(position)
        pages, position, need = int(part * pages), position.reshape(-1), jnp.diff(until, prepend=0)
        nth = jax.lax.associative_scan(jnp.add, owned.astype(jnp.int32), axis=1) - 1
        place = jnp.where(owned, size * (until - need)[:, None] + nth, 0).sum(0, dtype=jnp.int32)
        target = jnp.where(position >= 0, place, pages * size)
        source = jnp.full(pages * size, pool, jnp.int32).at[target].set(iota(pool), mode="drop").reshape(pages, size)
        whose = jnp.minimum((iota(pages)[:, None] >= until).sum(-1, dtype=jnp.int32), kv_heads - 1)

        def take(x, absent=0, rows=False):
            axis = x.ndim - (3 if rows else 2)
            taken = jnp.take(
                x.reshape(*x.shape[:axis], pool, *x.shape[axis + 2 :]), jnp.minimum(source, pool - 1), axis
            )
            there = (source < pool)[..., None] if rows else source < pool
            return jnp.where(there, taken, jnp.asarray(absent, x.dtype))

        def back(x):
            return x.reshape(*x.shape[:-2], -1)[..., place].reshape(*x.shape[:-2], *self.whose.shape)

        return Opened(Paged(whose, kv_heads), take, back)


def of_stores(stores: int, slots: int, kv_heads: int) -> Apart | Shared:
    """The layout of an empty cache."""
    if stores == kv_heads:
        return Apart()
    return Shared(jnp.zeros((stores, slots), jnp.int32), kv_heads // stores)
