"""What every model gives to this package: its shape, an embedding, layers that attend by a given function, and logits.

`corm_jax.Transformer` is such a `Decoder`, and so is any model of yours. The caches stay here: a layer calls ``attend``
with queries, keys and values in place of its own attention, and that reads through the layer's cache, and evicts. So
generation, reading, recording, calibration and evaluation are the same for all models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from corm_jax.core import cache as cache_lib
from corm_jax.core import step
from corm_jax.core.arguments import check_caches, check_count
from corm_jax.core.arrays import broadcasts, iota
from corm_jax.core.capacity import capacities, per_layer_capacity, slots_of_window
from corm_jax.core.options import concrete, integer, shown
from corm_jax.core.policy import Policy
from corm_jax.core.positions import Encoding
from corm_jax.core.types import Caches, CacheSpec, Capacity, LayerCache
from corm_jax.errors import CormError
from corm_jax.policies.window import of_layers

Policies = Policy | Sequence[Policy]


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a decoder. All layers have as many heads of one size.

    Attributes:
      vocab: how many token ids there are.
      layers: how many layers; each attends once.
      heads, kv_heads: query heads and key-value heads of a layer. With ``group = heads / kv_heads``, query heads
        ``h * group`` to ``h * group + group - 1`` share key-value head ``h``.
      head_dim: numbers a head.
      context: positions that the model was trained on; beyond them quality is not to be expected.
      windows: for each layer how many positions its queries see, their own included; None for all. A layer with a
        window is *local*, the others are *global*; ``()``: all are global. A local layer itself passes its ``window``
        to `Attend`.
    """

    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 8192
    windows: tuple[int | None, ...] = ()


def windows_of(config: Any) -> tuple[int | None, ...]:
    """The ``windows`` of a `Shape`, one for each layer, also if the config has no such field, or ``()``.

    >>> windows_of(Shape(vocab=9, layers=3, heads=1, kv_heads=1, head_dim=8, windows=(512, 512, None)))
    (512, 512, None)

    Raises:
      CormError: for another number of windows than there are layers, or what is no window.
    """
    windows = getattr(config, "windows", ())
    if not isinstance(windows, tuple):
        raise CormError(f"config.windows must be a tuple, of a number or None for each layer, not {shown(windows)}")
    if not windows:
        return (None,) * config.layers
    if len(windows) != config.layers:
        raise CormError(f"config.windows has {len(windows)} windows for {config.layers} layers: give one for each")
    return tuple(one if one is None else integer(f"config.windows[{layer}]", one) for layer, one in enumerate(windows))


@runtime_checkable
class Attend(Protocol):
    """What a layer calls in place of its own attention, once, with the queries, keys and values of a block of tokens.

    Args:
      q: ``[batch, tokens, heads, head_dim]``.
      k, v: ``[batch, tokens, kv_heads, head_dim]``.
      encoding: how positions enter, if q and k come without them; None if the layer has encoded them.
      form: ``scale``, ``softcap``, ``window``, ``mask`` as in `corm_jax.step`.

    Returns:
      The outputs of the heads, as ``q``.
    """

    def __call__(self, q: Any, k: Any, v: Any, encoding: Encoding | None = None, **form: Any) -> Any: ...


@runtime_checkable
class Layer(Protocol):
    """A layer: a pytree with its parameters.

    Args:
      x: hidden states ``[batch, tokens, dim]``.
      position: int32 ``[batch, tokens]``.
      attend: attention through the layer's cache.

    Returns:
      Hidden states, as ``x``.
    """

    def __call__(self, x: Any, position: Any, attend: Attend) -> Any: ...


@runtime_checkable
class Decoder(Protocol):
    """A model, as all of this package takes it: a pytree with four members.

    No class has to be inherited. Tokens come in a batch of rows, each with positions of its own; the last tokens of a
    block may be padding, which changes nothing.

        x = embed(tokens, position)
        for layer in layers:
            x = layer(x, position, attend)
        scores = logits(x)

    `corm_jax.adapters.Functions` makes a decoder of functions.

    Attributes:
      config: its `Shape`, or anything with these fields.
      layers: as many as the shape says.
    """

    @property
    def config(self) -> Any: ...

    @property
    def layers(self) -> Sequence[Layer]: ...

    def embed(self, tokens: Int[Array, "batch tokens"], position: Int[Array, "batch tokens"]) -> Any:
        """Hidden states ``[batch, tokens, dim]`` that enter the first layer. Caches have their dtype."""
        ...

    def logits(self, x: Any) -> Any:
        """Scores of the next token ``[..., vocab]``, of the hidden states ``[..., dim]`` that leave the last layer."""
        ...


MEMBERS = {"config": "its shape", "layers": "its layers", "embed": "a method", "logits": "a method"}


def check_decoder(model: Any, name: str) -> None:
    """Raises a `CormError` that names what a decoder lacks.

    >>> check_decoder(object(), "the model")
    Traceback (most recent call last):
        ...
    corm_jax.errors.CormError: the model is an object, which has no config (its shape): see corm_jax.Decoder
    """
    kind = type(model).__name__
    what = f"{name} is {'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
    for member, means in MEMBERS.items():
        if not hasattr(model, member):
            raise CormError(f"{what}, which has no {member} ({means}): see corm_jax.Decoder")
    for member in ("embed", "logits"):
        if not callable(getattr(model, member)):
            raise CormError(f"{what}, whose {member} is no method: see corm_jax.Decoder")
    for field in ("vocab", "layers", "heads", "kv_heads", "head_dim", "context"):
        integer(f"{name}: config.{field}", getattr(model.config, field, None))
    config = model.config
    if config.heads % config.kv_heads:
        raise CormError(f"{name}: {config.kv_heads} key-value heads cannot serve {config.heads} query heads evenly")
    if len(model.layers) != config.layers:
        raise CormError(f"{name} has {len(model.layers)} layers, and its config says {config.layers}")
    windows_of(config)
    for layer in model.layers:
        if not callable(layer):
            raise CormError(f"{name} has a layer that cannot be called: {shown(layer)}")
    for leaf in jax.tree.leaves(model):
        if not isinstance(leaf, jax.Array | np.ndarray):
            way_out = "register its class with JAX, and what is no parameter as static"
            raise CormError(f"{name} must be a pytree of arrays, and has the leaf {shown(leaf)}: {way_out}")


def policies_of(model: Decoder, policy: Policies) -> tuple[Policy, ...]:
    """The policy of each layer: the one given, or that of the list, and `corm_jax.Window` for local layers."""
    return of_layers(policy, model.config.layers, windows_of(model.config))


def check_length(config: Any, tokens: int) -> None:
    """Raises if more tokens are to be read than the model has learned positions.

    >>> from corm_jax import Config
    >>> shape = {"vocab": 9, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "context": 512}
    >>> check_length(Config(**shape, dim=8, hidden=8), 1000)
    >>> check_length(Config(**shape, dim=8, hidden=8, rope=None, learned=True), 1000)
    Traceback (most recent call last):
        ...
    corm_jax.errors.CormError: 1000 tokens cannot be read: the model has learned 512 positions; read fewer tokens
    """
    if getattr(config, "learned", False) and tokens > config.context:
        raise CormError(
            f"{tokens} tokens cannot be read: the model has learned {config.context} positions; read fewer tokens"
        )


def hidden(model: Decoder, batch: int = 1, tokens: int = 1) -> jax.ShapeDtypeStruct:
    """The shape and dtype of hidden states; caches have the same dtype."""
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return jax.eval_shape(lambda model, ids: model.embed(ids, ids), model, ids)


def make_caches(
    model: Decoder,
    policy: Policies,
    *,
    batch: SupportsIndex,
    capacity: Capacity,
    stores: SupportsIndex | None = None,
    tokens: SupportsIndex | None = None,
    chunk: SupportsIndex = 1,
) -> Caches:
    """Empty caches for a model, one a layer.

    A local layer (`Shape`) holds the keys that its window shows, whatever the policy, in as many slots as that needs:
    ``window - 1 + chunk``, or those for all ``tokens`` if these are fewer.

    Args:
      policy: one for all layers, or a sequence with one for each; those of local layers have no effect.
      batch: rows.
      capacity: slots a key-value head; for all layers, or a sequence with one for each, in which those of local layers
        have no effect.
      stores: sets of slots a layer; 1 is a pool, which its heads share. None: one for each head.
      tokens: how many will be read at most, if that is known: see `corm_jax.make_cache`.
      chunk: tokens between evictions, at most.

    Raises:
      CormError: for more ``tokens`` than the model has learned positions, besides what `corm_jax.make_cache` refuses.
    """
    config, dtype, windows = model.config, hidden(model).dtype, windows_of(model.config)
    chunk, tokens = integer("chunk", chunk), None if tokens is None else integer("tokens", tokens)
    shared = None if stores is None else integer("stores", stores)
    check_length(config, tokens or 1)

    def one(policy: Policy, window: int | None, size: int) -> LayerCache:
        size = size if window is None else slots_of_window(window, chunk, tokens)
        spec = CacheSpec(config.kv_heads, size, config.head_dim, dtype, shared)
        cache = cache_lib.make_cache(policy, spec, batch, tokens=tokens)
        if window is None or cache.made is None:
            return cache
        enough = tokens is not None and size >= tokens
        return cache._replace(made=replace(cache.made, window=window, enough=enough))

    return Caches.of(map(one, policies_of(model, policy), windows, per_layer_capacity(capacity, config.layers)))


def _check_windows(model: Decoder, caches: Caches, chunk: int) -> None:
    """Raises unless the caches are for a model with these local layers, and for chunks of this size."""
    each = zip(windows_of(model.config), capacities(caches), caches.layers, strict=True)
    for layer, (window, slots, cache) in enumerate(each):
        made = cache.made
        if made and made.window != window:
            raise CormError(
                f"the cache of layer {layer} was made for a window of {made.window}, and that of the model is {window} "
                "there: make caches for this model"
            )
        if window is not None and slots < window - 1 + chunk and not (made and made.enough):
            raise CormError(
                f"layer {layer} is local and its {slots} slots a head cannot hold a window of {window} beside a chunk "
                f"of {chunk} tokens: make the caches with chunk={chunk}"
            )


class Course(NamedTuple):
    """What became of a block of tokens on its way through the caches.

    Attributes:
      live: int32 ``[layer, batch, chunks, kv_heads]``, live keys after each chunk.
      passes: float32 ``[layer, batch]``, how often a block of the exact recurrence attended until its evictions were
        settled (`corm_jax.core.exact`), on average over those with tokens; in chunks 1.
    """

    live: Int[Array, "layer batch chunks kv_heads"]
    passes: Float[Array, "layer batch"]


@broadcasts
def forward(
    model: Decoder,
    policy: Policies,
    caches: Caches,
    tokens: Int[Array, "batch tokens"],
    count: Int[Array, " batch"],
    *,
    chunk: int,
) -> tuple[Float[Array, "batch tokens dim"], Caches, Course]:
    """Reads a block of tokens through the caches.

    Args:
      policy: as for `make_caches`.
      caches: what `make_caches` or an earlier call returned.
      tokens: int32 ``[batch, tokens]``; positions go on from each row's clock.
      count: how many tokens of each row are real, from 0 to all; the rest is padding, and changes nothing. Traced
        counts that are not in that range count as its nearest end.
      chunk: tokens between evictions; it divides the number of tokens. 1 is the exact recurrence.

    Returns:
      Hidden states for `Decoder.logits`, the caches, and what became of the block.

    Raises:
      CormError: for caches of another model, policy or batch, and for a layer that does not attend once.

    >>> from corm_jax import Config, Corm, Transformer
    >>> from flax import nnx
    >>> config = Config(vocab=100, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8)
    >>> model, policy = Transformer(config, rngs=nnx.Rngs(0)), Corm(window=4, recent=2)
    >>> caches = make_caches(model, policy, batch=1, capacity=16)
    >>> x, caches, course = forward(model, policy, caches, jnp.arange(12)[None], jnp.array([12]), chunk=1)
    >>> model.logits(x).shape, course.live.shape      # live keys [layer, batch, chunks, kv_heads]
    ((1, 12, 100), (2, 1, 12, 2))
    """
    config = model.config
    policies = policies_of(model, policy)
    if np.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        what = f"{jnp.result_type(tokens)} of the shape {np.shape(tokens)}"
        raise CormError(f"tokens must be whole numbers [batch, tokens], got {what}")
    check_caches(policies, caches, config.kv_heads, config.head_dim, batch=len(tokens))
    _check_windows(model, caches, chunk)
    count = check_count(count, *tokens.shape)
    x = model.embed(tokens, _position(caches, tokens.shape[1]))
    updated, live, passes = [], [], []
    for layer, cache, one in zip(model.layers, caches, policies, strict=True):
        x, cache, live_in_layer, passes_in_layer = through(layer, x, cache, one, count, chunk=chunk)
        updated.append(cache)
        live.append(live_in_layer)
        passes.append(passes_in_layer)
    return x, Caches.of(updated), Course(jnp.stack(live), jnp.stack(passes))


@partial(jax.jit, static_argnames="chunk")
@broadcasts
def through(
    layer: Layer, x: Any, cache: LayerCache, policy: Policy, count: Int[Array, " batch"], *, chunk: int
) -> tuple[Any, LayerCache, Int[Array, "batch chunks kv_heads"], Float[Array, " batch"]]:
    """Reads a block through one layer: what leaves it, its cache, live keys by chunk, and `Course.passes`.

    There is one trace for all equal layers: to trace each by itself takes longer than to load their compiled program.
    """
    found, window = [], cache.made and cache.made.window

    def attend(q, k, v, encoding=None, **form):
        if found:
            raise CormError(f"the layer {_name(layer)} attends twice, and has one cache: make two layers of it")
        own = form.get("window")
        if window is not None and (own is None or (concrete(own) and np.any(own != window))):
            raise CormError(
                f"the layer {_name(layer)} attends with window={own}, and config.windows says {window}: its cache "
                "would not hold what it sees"
            )
        shape, kv_heads, group = q.shape, cache.overflow.shape[-1], q.shape[2] // cache.overflow.shape[-1]
        read = jax.vmap(partial(step.read, chunk=chunk, **form), in_axes=(None, 0, 0, 0, 0, 0, None))
        grouped = q.reshape(*shape[:2], kv_heads, group, shape[-1])
        output, *rest = read(policy, cache, grouped, k, v, count, encoding)
        found.extend(rest)
        return output.reshape(shape)

    x = layer(x, _position(cache, x.shape[1]), attend)
    if not found:
        raise CormError(f"the layer {_name(layer)} did not call attend(q, k, v), so that it has no use for its cache")
    after, live, passes = found
    blocks = passes.shape[1]
    some = iota(blocks) * -(-x.shape[1] // blocks) < count[:, None]  # blocks with tokens
    total, number = (one.sum(1, dtype=jnp.float32) for one in (jnp.where(some, passes, 0), some))
    return x, after, live, total / jnp.maximum(number, 1.0)


def _position(cache: Caches | LayerCache, tokens: int) -> Int[Array, "batch tokens"]:
    """Those of the tokens that come next."""
    return cache.clock.seen[:, None] + iota(tokens)  # pyright: ignore


def _name(layer: Any) -> str:
    return getattr(getattr(layer, "func", layer), "__name__", type(layer).__name__)
