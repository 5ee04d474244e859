"""Tokens through one layer of one sequence: insert, attend, observe, evict.

A step of one token has no loop: a slot is chosen, and attention runs over the slots as they are. Several tokens are
stored in free slots first as well. The exact recurrence needs no slots for keys that it evicts within a block: if there
may be too few slots, the block gets additional ones, and the keys that stay are moved out of them at its end.

The keys of a layer depend on the layers below, never on what this layer has evicted. So a model can project a whole
block of tokens at once, and only attention and eviction go through the loop over chunks here.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from corm_jax.core import attention, storing
from corm_jax.core import cache as cache_lib
from corm_jax.core.arguments import check_step
from corm_jax.core.arrays import EMPTY, ENDLESS, anywhere, broadcasts, iota, narrow, varying
from corm_jax.core.exact import FOREVER, Block, Room, alive, settle
from corm_jax.core.form import Form
from corm_jax.core.layout import PART, as_it_is
from corm_jax.core.observation import observed
from corm_jax.core.options import concrete, integer
from corm_jax.core.policy import Policy
from corm_jax.core.positions import Encoding
from corm_jax.core.types import LayerCache, by_slot
from corm_jax.errors import CormError


@broadcasts
def step(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""] | SupportsIndex,
    encoding: Encoding | None = None,
    *,
    scale: Any = None,
    softcap: Any = None,
    window: Any = None,
    mask: Callable[[Array, Array], Array] | None = None,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache]:
    """One chunk through one layer of one sequence: insert, attend, observe, evict.

    Numbers that are not finite affect only their row of a batch and their head. A query that sees a key or a value that
    is not finite gets NaN (see `attend`, `corm_jax.core.storing.stored`); earlier queries do not, nor do queries after
    the key has been evicted. They affect other heads only through what heads share: the slots of a store that
    overflows, Ada-KV's budget, and TOVA's mean, in which they count as 0.

    The outputs are differentiable with respect to ``q``, ``k``, ``v`` and the contents of the cache. The decisions
    which keys are evicted count as constants.

    Args:
      policy, cache: the rule, and the cache that `corm_jax.make_cache` or the step before returned. If the policy waits
        for the end of the prompt, call `corm_jax.begin_prompt` first.
      q, k, v: the chunk's queries, keys and values, at positions ``cache.clock.seen + (0, 1, ...)``. Each query sees
        the live keys and, causally, the chunk.
      count: how many of the tokens are real, from 0 to all; the rest pads a ragged batch, and has no effect. Tokens
        beyond the end of the clock, 2^31 - 1, have none either. A traced count outside the range is clipped to it.
      encoding: how positions enter, such as `corm_jax.Rotary` or `corm_jax.ALiBi`, if queries and keys come without
        them. None if the model has encoded them already; a policy that counts ``positions`` within the cache needs one.
      scale, softcap, window, mask: the form of the attention, see `corm_jax.core.form.Form`. Numbers may be traced.
        A key that a query may not see is in the cache all the same: it takes a slot, and gets no attention.

    Returns:
      The outputs, in the dtype of ``q``, and the cache.

    Raises:
      CormError: for arguments whose shapes do not fit together, a cache of another policy, more tokens than the cache
        has slots, and without an ``encoding`` or an end of the prompt that the policy needs.

    >>> from corm_jax import CacheSpec, Corm, make_cache
    >>> policy = Corm(window=4, recent=2)
    >>> cache = make_cache(policy, CacheSpec(kv_heads=1, capacity=4, head_dim=8))
    >>> q, k = jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 8))
    >>> output, cache = step(policy, cache, q, k, k, count=3)
    >>> cache.position.tolist(), cache.state.tolist()      # all equal, so all important at t = 3
    ([[0, 1, 2, -1]], [[3, 3, 3, -2147483648]])
    """
    form = Form(encoding, scale, softcap, window, mask)
    policy, cache, q, k, count = _checked(policy, cache, q, k, v, count, form)
    output, after = (_one if len(q) == 1 else _several)(policy, cache, q, k, v, count, form)
    return output, _varying(after, cache.position)


@broadcasts
def read(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""] | SupportsIndex,
    encoding: Encoding | None = None,
    *,
    chunk: SupportsIndex,
    scale: Any = None,
    softcap: Any = None,
    window: Any = None,
    mask: Callable[[Array, Array], Array] | None = None,
) -> tuple[
    Float[Array, "tokens kv_heads group head_dim"],
    LayerCache,
    Int[Array, "chunks kv_heads"],
    Int[Array, " blocks"],
]:
    """Reads a block of tokens through one layer, with the result of one `step` after another of ``chunk`` tokens each.

    With ``chunk=1``, the exact recurrence, many tokens are read at once all the same, see `corm_jax.core.exact`.

    The arguments are those of `step`; ``chunk`` divides the number of tokens. Returns the outputs, the cache, the
    number of live keys after each chunk, and the number of attention passes for each block of the exact recurrence
    (for chunks: 1).
    """
    tokens, chunk = q.shape[0], integer("chunk", chunk)
    if tokens % chunk:
        raise CormError(f"chunk {chunk} does not divide a block of {tokens} tokens: pad the block, and say so in count")
    form = Form(encoding, scale, softcap, window, mask)
    policy, cache, q, k, count = _checked(policy, cache, q, k, v, count, form)
    exact = chunk == 1 and tokens > 1 and not counts_in_cache(policy) and not policy.traits.merges
    size = min((cache.made and cache.made.block) or policy.traits.block, tokens) if exact else chunk
    blocks = -(-tokens // size)

    def body(before, xs):
        q, k, v, start = xs
        here = jnp.clip(count - start, 0, size)
        if exact:
            output, cache, live, passes = _exactly(policy, before, q, k, v, here, form)
        else:
            output, cache = (_one if size == 1 else _several)(policy, before, q, k, v, here, form)
            live, passes = cache_lib.live_keys(cache)[None], jnp.int32(1)
        return _varying(cache, before.position), (output, live, passes)

    def cut(x):
        padded = jnp.pad(x, ((0, blocks * size - tokens), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(blocks, size, *x.shape[1:])

    xs = *(cut(x) for x in (q, k, v)), size * iota(blocks)
    cache, (outputs, live, passes) = jax.lax.scan(body, cache, xs, unroll=blocks == 1)
    live = live.reshape(-1, live.shape[-1])[: tokens // chunk]
    return outputs.reshape(-1, *q.shape[1:])[:tokens], cache, live, passes


@broadcasts
def look(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""] | SupportsIndex,
    encoding: Encoding | None = None,
    *,
    scale: Any = None,
    softcap: Any = None,
    window: Any = None,
    mask: Callable[[Array, Array], Array] | None = None,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache]:
    """Reads a chunk without storing it: its queries attend, and the policy observes their attention to the live keys.

    KVzip (arXiv 2505.23416) reads a context a second time in this way: a model reads it again, or a question about it,
    and the attention shows which keys are needed. Each query sees the live keys and, causally, the chunk, as in `step`.
    Afterwards the cache has the same keys and the same clock; only the state of the policy has changed. Nothing is
    evicted before the next `step`.

    Arguments and errors are those of `step`; the chunk takes no slots.

    Returns:
      The outputs, in the dtype of ``q``, and the cache.

    >>> from corm_jax import H2O, CacheSpec, make_cache
    >>> policy = H2O(recent=0)
    >>> cache = make_cache(policy, CacheSpec(kv_heads=1, capacity=3, head_dim=8))
    >>> q, k = jnp.ones((2, 1, 1, 8)), jnp.ones((2, 1, 8))
    >>> _, cache = step(policy, cache, q, k, k, 2)
    >>> _, again = look(policy, cache, q, k, k, 2)                  # all equal: of three keys, then of four
    >>> again.position.tolist(), np.asarray(again.state - cache.state)[0].round(3)
    ([[0, 1, -1]], array([0.583, 0.583, 0.   ], dtype=float32))
    """
    form = Form(encoding, scale, softcap, window, mask)
    policy, cache, q, k, count = _checked(policy, cache, q, k, v, count, form)
    since, tokens, (stores, slots) = cache_lib.clock_of(cache).seen, len(q), cache.position.shape
    extra = tokens * (len(cache.overflow) // stores)
    wider = storing.insert_chunk(policy, storing.enlarged(cache, extra), *storing.stored(k, v, cache.k.dtype), count)
    held = _Open(wider, since, tokens, count)
    output, state = _observed(policy, form, held, q)
    live = cache.position >= 0  # what was read may have taken free slots
    state = by_slot(lambda new, old: jnp.where(live, new[..., :slots], old), by_slot(held.back, state), cache.state)
    return output, cache._replace(state=state)


def _checked(policy, cache, q, k, v, count, form):
    policy, count = narrow(policy), check_step(policy, cache, q, k, v, count, form)
    if not counts_in_cache(policy):
        position = cache.clock.seen + iota(len(q))
        q, k = form.encoded(q, position), form.encoded(k, position)
    cache = cache._replace(state=jax.lax.stop_gradient(cache.state))  # decisions have no gradient
    cache = cache._replace(clock=varying(cache.clock, count))
    cache = _varying(cache, policy, cache, q, k, v)
    return policy, cache, q, k, jnp.minimum(count, ENDLESS - cache.clock.seen)


def _varying(cache: LayerCache, *others: Any) -> LayerCache:
    """The cache as loops carry it. The clock varies over devices only where rows do."""
    return varying(cache._replace(clock=None), *others)._replace(clock=cache.clock)


def _one(policy, cache, q, k, v, count, form):
    """One token, without loops, sorts, or copies of the cache."""
    real, clock = count > 0, (cache.clock.seen + 1)[None, None, None]
    k, v = storing.stored(k, v, cache.k.dtype)
    cache = storing.insert(policy, cache, k[:, 0], v[:, 0], real)
    slots, layout = replace(cache_lib.slots(cache), arrived=1), cache.layout
    visible = (slots.live & real)[None]
    seen, q, keys, bias = _seen(policy, form, slots, visible, clock, q, cache.k)
    weights, total = attention.softmax(layout, form.logits(layout, q, keys, bias), seen)
    output = attention.output(layout, weights, total, cache.v).astype(q.dtype)
    weights, total, *held = jax.lax.stop_gradient((weights, total, keys, cache.v, form.queries(q)))
    state = policy.observe(cache.state, observed(layout, weights, total, visible, clock, *held), slots)
    keep = policy.retain(state, slots) | ~real
    cache = storing.merged(policy, cache._replace(state=state), slots, keep)
    return output, cache._replace(position=jnp.where(keep, cache.position, EMPTY))


def _seen(policy, form, slots, visible, clock, q, keys):
    """The slots that the queries see, queries and keys encoded by their positions, and the bias of the logits."""
    within = form.within(clock - 1, slots.position)
    seen = visible if within is None else visible & within
    if counts_in_cache(policy):
        return seen, *form.in_cache(q, keys, slots, clock)
    return seen, q, keys, form.bias(clock - 1, slots.position, slots.layout)


class _Open:
    """The keys of a cache, new ones included, laid out for many queries, and the way back."""

    def __init__(
        self, cache: LayerCache, since: Array, tokens: int, count: Array, paged: bool = True, part: float = 1.0
    ):
        self.cache, self.since, self.tokens = cache, since, tokens
        opened = cache.layout.opened(cache.position, part) if paged else as_it_is(cache.layout)
        take, self.back = opened.take, opened.back
        self.k, self.v, self.state = take(cache.k, rows=True), take(cache.v, rows=True), by_slot(take, cache.state)
        view = replace(cache_lib.slots(cache), layout=opened.layout, twin=None, arrived=tokens)
        self.slots = replace(view, position=take(cache.position, EMPTY), place=by_slot(take, cache.place))
        self.clock = (since + 1 + iota(tokens))[:, None, None]
        real = (iota(tokens) < count)[:, None, None]
        self.visible = self.slots.live & (self.slots.position < self.clock) & real

    def closed(self, keep: Array, state: Any, extra: int = 0) -> LayerCache:
        """The cache with only the keys in ``keep``, and without ``extra`` slots at the end of its stores."""
        position = jnp.where(self.back(keep), self.cache.position, EMPTY)
        cache = self.cache._replace(position=position, state=by_slot(self.back, state))
        cache = storing.shrunk(cache, extra) if extra else cache
        return storing.twinned(cache, self.since, self.tokens)


def _several(policy, cache, q, k, v, count, form):
    """A chunk: slots are freed before it, and keys are evicted after it."""
    since, tokens = cache.clock.seen, len(q)
    cache = storing.make_room(policy, cache, count, tokens)
    cache = storing.insert_chunk(policy, cache, *storing.stored(k, v, cache.k.dtype), count)
    if policy.traits.merges:
        held = _Open(cache, since, tokens, count, paged=False)
        output, state = _observed(policy, form, held, q)
        keep = policy.retain(state, held.slots) | (count == 0)
        held.cache = storing.merged(policy, cache._replace(state=state), held.slots, keep)
        return output, held.closed(keep, held.cache.state)

    def attended(part=1.0):
        held = _Open(cache, since, tokens, count, part=part)
        output, state = _observed(policy, form, held, q)
        keep = policy.retain(state, held.slots) | (count == 0)
        return output, held.back(keep), by_slot(held.back, state)

    few = cache.layout.few(cache.position)
    if few is None:
        output, keep, state = attended()
    else:  # on a GPU the host would have to ask the device which branch to take

        def by_use():
            return jax.lax.cond(anywhere(~few), attended, partial(attended, PART))

        output, keep, state = jax.lax.platform_dependent(cpu=by_use, default=attended)
    cache = cache._replace(position=jnp.where(keep, cache.position, EMPTY), state=state)
    return output, storing.twinned(cache, since, tokens)


def _observed(policy, form, held, q):
    """The output of a chunk of queries over an open cache, and the policy's state after it."""
    layout = held.slots.layout
    seen, q, keys, bias = _seen(policy, form, held.slots, held.visible, held.clock, q, held.k)
    if watched(policy):
        weights, total = attention.softmax(layout, form.logits(layout, q, keys, bias), seen)
        output = attention.output(layout, weights, total, held.v)
    else:
        output = attention.attended(layout, q, keys, held.v, seen, held.slots.live, form, bias)
        weights = jnp.zeros((q.shape[2], *seen.shape), jnp.float32)
        total = jnp.ones((q.shape[2], *q.shape[:2]), jnp.float32)
    weights, total, *columns = jax.lax.stop_gradient((weights, total, keys, held.v, form.queries(q)))
    found = observed(layout, weights, total, held.visible, held.clock, *columns)
    return output.astype(q.dtype), policy.observe(held.state, found, held.slots)


def _exactly(policy, cache, q, k, v, count, form):
    """A block, as if read token by token. If there may be too few slots, it has additional ones until its end."""
    made, spec, since, tokens = cache.made, cache_lib.spec(cache), cache.clock.seen, len(q)
    stores, size = cache.position.shape
    room = None if made and made.roomy else Room(size, spec.kv_heads // stores)
    extra = 0 if room is None else tokens * room.heads
    cache = storing.enlarged(cache, extra) if extra else cache
    cache = storing.insert_chunk(policy, cache, *storing.stored(k, v, cache.k.dtype), count)
    held = _Open(cache, since, tokens, count)
    layout = held.slots.layout
    within = form.within(held.clock - 1, held.slots.position)
    bias = form.bias(held.clock - 1, held.slots.position, layout)
    every = form.logits(layout, q, held.k, bias) if watched(policy) else None
    fixed, *columns = jax.lax.stop_gradient((every, held.k, held.v, form.queries(q)))
    softmax: Any = None if fixed is None else partial(attention.softmax, layout, fixed)
    block = Block(held.slots, held.clock, held.visible, softmax, fixed, *columns, within=within)
    known = policy.traits.moments
    moments = bool(np.min(known) >= tokens) if concrete(known) else made and made.moments
    found = settle(policy, held.state, cache_lib.fresh(policy, spec), block, room, moments)
    seen = block.attended(held.visible & (held.clock <= found.until))
    if every is None:
        output = attention.attended(layout, q, held.k, held.v, seen, held.slots.live, form, bias)
    else:
        again = attention.derived_from(_anew, _as_found)
        output = again(layout, every, held.v, seen, found.weights, found.total)
    live = alive(block, found.until, found.lost)
    cache = held.closed(held.slots.live & (found.until == FOREVER), found.state, extra)
    overflow = cache.overflow + held.slots.sum_per_head(found.lost)
    return output.astype(q.dtype), cache._replace(overflow=overflow), live, found.passes


def _anew(layout, every, v, seen, weights, total):
    return attention.output(layout, *attention.softmax(layout, every, seen), v)


def _as_found(layout, every, v, seen, weights, total):
    return attention.output(layout, weights, total, v)


def watched(policy: Any) -> bool:
    """Whether the policy needs the attention."""
    return "attention" in policy.traits.needs


def counts_in_cache(policy: Any) -> bool:
    """Whether keys are rotated by their place within the cache, see `corm_jax.core.policy.Traits`."""
    return policy.traits.positions == "cache"
