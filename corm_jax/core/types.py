"""The data that policies, caches and models exchange: small pytrees. Axes are named as in `corm_jax.core.arrays`.

One layer of one sequence is the unit throughout; batches come from `jax.vmap`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from corm_jax.core.layout import Layout
from corm_jax.showing.brief import between, leaves, line, numbers, table

State: TypeAlias = PyTree[Any]
"""The state of a policy: a pytree of arrays ``[..., *slots]``, one part for each slot, and of `OfHead`."""


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True)
class OfHead:
    """A part of a policy's state that belongs to a head, not to a slot: it stays when keys are evicted.

    Attributes:
      value: an array ``[..., kv_heads]``.
    """

    value: Any  # unchecked, since JAX builds such objects of whatever it has


def by_slot(function: Callable[..., Any], state: State, *others: State) -> State:
    """Applies a function to each part of a state that belongs to slots, beside the same part of other states."""

    def one(part, *more):
        return part if isinstance(part, OfHead) else function(part, *more)

    return jax.tree.map(one, state, *others, is_leaf=lambda part: isinstance(part, OfHead))


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


@partial(jax.tree_util.register_dataclass, data_fields=["seen", "prompt"], meta_fields=["stage"])
@dataclass(frozen=True)
class Clock:
    """Where a sequence stands. In a batch each row has its own: ``[batch]``.

    Attributes:
      seen: int32 scalar, tokens read so far.
      prompt: int32 scalar, the clock at which the prompt ends; `ENDLESS` if that is unknown.
      stage: ``"unknown"`` if the end of the prompt is unknown, ``"reading"`` while the prompt is read, ``"read"``
        afterwards. It is static, so that mistakes are found while a program is traced.
    """

    seen: Any  # unchecked, since JAX builds such objects of whatever it has
    prompt: Any
    stage: str = "unknown"

    def after(self, count: Int[Array, ""] | Bool[Array, ""] | int) -> "Clock":
        """The clock after ``count`` more tokens."""
        return replace(self, seen=self.seen + jnp.asarray(count, jnp.int32))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Made:
    """What is known of a cache without its arrays. It is static: mistakes are found while a program is traced.

    Attributes:
      policy: the name of the policy whose state the cache holds.
      kv_heads: how many heads the layer has; a device may have a part of them. 0 if unknown.
      enough: whether there are slots for all tokens that will be read, though fewer than the policy protects keys.
      roomy: whether there are slots for all tokens of the prompt, so that none overflows.
      block: queries that the exact recurrence reads at once; None for the policy's own number.
      moments: whether ``block`` is within the policy's ``moments``; None if that was not checked.
      window: how many positions the queries of a local layer see; None for a global layer.
    """

    policy: str
    kv_heads: int = 0
    enough: bool = False
    roomy: bool = False
    block: int | None = None
    moments: bool | None = None
    window: int | None = None


class LayerCache(NamedTuple):
    """One layer's keys and values in a fixed number of slots, with the policy's state beside them.

    Position is data, slot is storage: a key may be in any slot of its store. In a batch every leaf has a leading
    ``batch`` axis, and each row its own clock.

    Attributes:
      k, v: ``[*slots, head_dim]``, keys rotated at their positions, unless the policy counts ``positions`` within the
        cache. Values are finite, those of empty slots too: see `corm_jax.core.storing.stored`.
      position: int32 ``[*slots]``, `EMPTY` where no key is.
      state: the policy's state.
      overflow: int32 ``[kv_heads]``, keys that were evicted because no slot was free.
      layout: which head each slot belongs to.
      twin: int32 ``[kv_heads, *slots]``, for a policy with `twins`: in which slot, counted over all
        stores, each head holds or held the token whose key the slot holds. None for others.
      place: int32 ``[*slots]``, for a policy that counts ``positions`` within the cache: how many keys of its head
        stood before the slot's key when tokens were last stored. None for others.
      made: what is known of it without its arrays. None if nothing is.
      clock: where the sequence stands. None in `Caches`, which hold it once for all layers.
    """

    k: Float[Array, "*slots head_dim"]
    v: Float[Array, "*slots head_dim"]
    position: Int[Array, "*slots"]
    state: State
    overflow: Int[Array, " kv_heads"]
    layout: Layout
    twin: Int[Array, "kv_heads *slots"] | None = None
    place: Int[Array, "*slots"] | None = None
    made: Made | None = None
    clock: Clock | None = None

    def __repr__(self) -> str:
        about = _in_short([self], self.clock)
        return leaves("LayerCache", self) if about is None else line("LayerCache", **about)


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "clock"], meta_fields=[])
@dataclass(frozen=True)
class Caches:
    """The caches of a model: one a layer, and the clock of the sequence that all of them hold.

    They are a sequence of `LayerCache`, each with the clock. Every leaf has a leading ``batch`` axis.

    Attributes:
      layers: a `LayerCache` a layer, without a clock.
      clock: where the sequence stands.
    """

    layers: Any
    clock: Any

    @classmethod
    def of(cls, layers: Iterable[LayerCache]) -> "Caches":
        """The caches of layers that stand at the same place."""
        layers = tuple(layers)
        return cls(tuple(one._replace(clock=None) for one in layers), layers[0].clock)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]._replace(clock=self.clock)

    def __iter__(self) -> Iterator[LayerCache]:
        return (one._replace(clock=self.clock) for one in self.layers)

    def __repr__(self) -> str:
        about = _in_short(self.layers, self.clock)
        if about is None:
            return f"Caches(layers={self.layers!r}, clock={self.clock!r})"
        return line("Caches", **{"layers": len(self.layers)} | about)

    def _repr_html_(self) -> str | None:
        about = _in_short(self.layers, self.clock)
        return None if about is None else table("Caches", {"layers": len(self.layers)} | about)


def _in_short(layers: Any, clock: Any) -> dict[str, Any] | None:
    """What there is to say of caches: their shapes and, if they hold numbers that can be read, how full they are.

    None where the leaves are no arrays. While a program is traced, or after a donation, there are only shapes.
    """
    try:
        heads = [one.overflow.shape[-1] for one in layers]
        slots = [one.position.shape[-2:] for one in layers]
        batch = {one.position.shape[:-2] for one in layers}
        made = [one.made for one in layers if one.made]
        made = [one for one in made if one.window is None] or made  # the policy is that of the global layers
        about: dict[str, Any] = {"policy": made[0].policy if made else None}
        about |= {"batch": (batch.pop() or (None,))[0] if len(batch) == 1 else None, "kv_heads": between(heads)}
        about |= {"slots": between([stores * size // n for (stores, size), n in zip(slots, heads, strict=True)])}
        about |= {"stores": between([stores for stores, _ in slots]), "head_dim": layers[0].k.shape[-1]}
        about |= {"dtype": str(layers[0].k.dtype)}
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    found = [(numbers(one.position), numbers(one.overflow)) for one in layers]
    seen = None if clock is None else numbers(clock.seen)
    about |= {"seen": None if seen is None else between(seen)}
    if all(position is not None and overflow is not None for position, overflow in found):
        live = sum(int((position >= 0).sum()) for position, _ in found)  # pyright: ignore
        about |= {"live": f"{live / sum(overflow.size for _, overflow in found):.1f}"}  # pyright: ignore
        about |= {"overflow": sum(int(overflow.sum()) for _, overflow in found)}  # pyright: ignore
    return about


def global_layers(windows: Sequence[int | None]) -> list[int]:
    """The layers that see everything, by the windows of all layers; all layers if there is no such layer.

    >>> global_layers((512, None, 512, None)), global_layers((512, 512))
    ([1, 3], [0, 1])
    """
    return [layer for layer, window in enumerate(windows) if window is None] or list(range(len(windows)))


class Bytes(NamedTuple):
    """Memory in three numbers, each in bytes.

    Attributes:
      live: of the keys and values that are live.
      full: of the keys and values that an uncompressed cache of the same sequences holds. In a layer with a sliding
        window these are the newest, as many as the window is long.
      allocated: of every array of the caches, policy state included, whether in use or not.
    """

    live: int
    full: int
    allocated: int


class Usage(NamedTuple):
    """How full the caches of a model are. Arrays have the axes ``[layer, batch, kv_heads]`` unless said otherwise.

    Attributes:
      live: int32, slots that hold a key.
      seen: int32 ``[batch]``, tokens read.
      overflow: int32, keys that were evicted for lack of a slot.
      bytes_live, bytes_full, bytes_allocated: the `Bytes` of all layers.
      windows: for each layer how many positions its queries see; None for a global layer.
      local: the `Bytes` of the local layers; None if there are none.
    """

    live: jax.Array
    seen: jax.Array
    overflow: jax.Array
    bytes_live: int
    bytes_full: int
    bytes_allocated: int
    windows: tuple[int | None, ...]
    local: Bytes | None

    def __repr__(self) -> str:
        live, seen, overflow = map(numbers, self[:3])
        if live is None or seen is None or overflow is None or live.ndim != 3:
            return leaves("Usage", self)
        layers, batch, kv_heads = live.shape
        return line("Usage", layers=layers, batch=batch, kv_heads=kv_heads, seen=between(seen), **self.summary)

    def _repr_html_(self) -> str | None:
        if any(numbers(values) is None for values in self[:3]):
            return None
        return table("Usage", {"tokens read": between(self.seen)} | self.summary)

    @property
    def all(self) -> Bytes:
        """The bytes of all layers."""
        return Bytes(self.bytes_live, self.bytes_full, self.bytes_allocated)

    @property
    def of_global(self) -> Bytes:
        """The bytes of the global layers, which are those that the policy decides about."""
        return self.all if self.local is None else Bytes(*(x - y for x, y in zip(self.all, self.local, strict=True)))

    @property
    def kept(self) -> float:
        """Live share of the keys seen, mean over the heads of the global layers (of all, if none is global)."""
        live = np.asarray(self.live)[global_layers(self.windows)]
        return float(live.mean() / np.asarray(self.seen).mean())

    @property
    def summary(self) -> dict[str, str]:
        """In words: live keys of a head, keys that overflowed, and memory in three numbers; of local layers apart."""
        live = np.asarray(self.live)[global_layers(self.windows)]
        keys = {"live_keys": between(live), "overflow": str(int(np.asarray(self.overflow).sum()))}
        for before, one in {"": self.of_global, "local_": self.local}.items():
            sizes = {} if one is None else {"live": one.live, "allocated": one.allocated, "full": one.full}
            keys |= {before + name: f"{size / 2**20:.2f} MiB" for name, size in sizes.items()}
        return keys
