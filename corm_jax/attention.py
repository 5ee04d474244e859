"""Attention over slots, and the loop that makes it evict.

A layer's keys depend on the layers below, never on what this layer has evicted. So a model can project a whole block of
tokens at once and leave only attention and eviction to the loop over chunks here: even the exact recurrence (chunks
of one) passes over the weights once a block, not once a token.
"""

from functools import partial, reduce
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax import cache as cache_lib
from corm_jax.arguments import check_step
from corm_jax.errors import CormError
from corm_jax.policies.options import integer
from corm_jax.positions import rotate
from corm_jax.types import (
    EMPTY,
    ENDLESS,
    EVERYTHING,
    FEW,
    LayerCache,
    Observation,
    Policy,
    Slots,
    broadcasts,
    iota,
    narrow,
)

BLOCK = 512
"""Slots that many queries attend to at once, where nobody looks at the weights. Does not change results."""

LEAST = float(np.finfo(np.float32).min)
"""The logit of a slot that is not seen: finite, so that differences of such logits are numbers. Its weight is 0."""


@broadcasts
def attend(
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "*slots head_dim"],
    v: Float[Array, "*slots head_dim"],
    visible: Bool[Array, "tokens *slots"],
    seen: Int[Array, " tokens"],
    owned: Bool[Array, "kv_heads pages"] | None = None,
    watched: bool = True,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], Observation]:
    """Softmax attention of each query group over its head's visible slots.

        l_i = q . k_i / sqrt(head_dim),   e_i = exp(l_i - max l),   output = sum_i e_i v_i / sum_i e_i

    Logits and weights are float32 whatever ``k`` and ``v`` hold, and so are products, in full (on a GPU not in TF32),
    but for 16-bit keys and values, whose products are exact and summed in float32. A query that sees nothing returns
    zeros.

    What a query does not see does not reach it: no key of an invisible slot, whatever it holds, and no value as long as
    it is finite, as those of a cache are (`corm_jax.cache.insert`). A query that has no softmax, since a logit that it
    sees is NaN or +infinity, returns NaN, and policies see that it attended to nothing: weights of 0.

    The function is differentiable, forwards and backwards, with respect to ``q``, ``k`` and ``v``.

    Args:
      owned: whose keys the slots hold, as in `Slots`; None in a rectangle. In a pool every query meets every slot of
        the layer, and those that its head does not own are masked: kv_heads times the products, but each key and each
        value is read once, which is what takes the time when there are few queries. For many, see
        `corm_jax.cache.paged`; for one on an NVIDIA GPU, `corm_jax.kernel`.
      watched: whether the policy looks at the weights. If not, they may be zeros, and on a CPU many queries go through
        a rectangle block by block, which keeps nothing of the size tokens x slots and stops behind the last live slot.

    Returns:
      The output, in the dtype of ``q``, and what the policy gets to see. ``seen`` only passes through to the latter.
    """
    rows, scale = q.transpose(1, 2, 0, 3), q.shape[-1] ** -0.5
    whole = partial(_attend_pool if k.ndim == 2 else _attend_pages, scale=scale)
    attended = whole
    if not watched and owned is None and len(q) > FEW and k.shape[1] > BLOCK:
        attended = partial(_unwatched, whole=whole, scale=scale)
    if k.ndim == 2 and jax.default_backend() == "gpu":
        from corm_jax import kernel  # only where it is of use: Pallas takes its time to import

        if kernel.supports(rows, k):
            one_pass = _derived_from(whole, partial(kernel.attend_pool, scale=scale))
            attended = partial(jax.lax.platform_dependent, cuda=one_pass, default=whole)
    output, weights, total = attended(rows, k, v, visible, owned)
    broken = jnp.isnan(total)
    weights, total = jnp.where(broken, 0.0, weights), jnp.where(broken, 1.0, total)
    times = seen.reshape(-1, *(1,) * (visible.ndim - 1))
    return output.transpose(2, 0, 1, 3).astype(q.dtype), Observation(weights, total, visible, times, k)


def _derived_from(plain, fast):
    """A ``fast`` way to compute what ``plain`` computes, with the derivatives of the latter: loops have none."""

    def derivative(primals, tangents):
        return jax.jvp(broadcasts(plain), primals, tangents)

    both = jax.custom_jvp(fast)
    both.defjvp(derivative)
    return both


def product(axes: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum that is summed in float32, of float32 factors in full precision, of equal 16-bit factors as they are.

    Without being told so, a GPU rounds float32 factors to the 11 bits of TF32, which turns about one verdict of
    alpha >= 1/t in 20,000.
    """
    if x.dtype != y.dtype or x.dtype.itemsize != 2:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=jnp.float32)


def _weighted(axes, weights, v):
    """A sum of values by weights, which get the dtype of the values if that has 16 bits."""
    return product(axes, weights.astype(v.dtype) if v.dtype.itemsize == 2 else weights, v)


def _shift(largest):
    """What logits are measured from: the largest, or 0 where nothing is seen. A softmax does not depend on it."""
    return jax.lax.stop_gradient(jnp.where(largest <= LEAST, 0.0, largest))


def _attend_pages(rows, k, v, visible, owned, scale):
    """Every page against the queries of its own head: ``rows [kv_heads, group, tokens, head_dim]``."""

    def over_head(combine, per_page, initial):  # each page gets what all pages of its head come to
        if owned is None:
            return per_page, per_page
        per_head = combine(jnp.where(owned[..., None, None, None], per_page, initial), axis=1)
        return per_head, per_head[head]

    head = None if owned is None else jax.lax.argmax(owned, 0, jnp.int32)
    logits = product("pgtd,pcd->pgtc", rows if owned is None else rows[head], k)
    logits = jnp.where(visible.swapaxes(0, 1)[:, None], logits * scale, LEAST)
    _, largest = over_head(jnp.max, logits.max(-1, keepdims=True), LEAST)
    weights = jnp.exp(logits - _shift(largest))
    per_head, total = (jnp.where(x == 0.0, 1.0, x) for x in over_head(jnp.sum, weights.sum(-1, keepdims=True), 0.0))
    output, _ = over_head(jnp.sum, _weighted("pgtc,pcd->pgtd", weights, v), 0.0)
    return output / per_head, weights.transpose(1, 2, 0, 3), total.transpose(1, 2, 0, 3)


def _unwatched(rows, k, v, visible, owned, whole, scale):
    """The output, and zeros for weights that nobody looks at."""

    def output(*arguments):
        return whole(*arguments)[0]

    blocks = _derived_from(output, partial(_attend_blocks, scale=scale))
    kv_heads, group, tokens, _ = rows.shape
    weights = jnp.zeros((group, tokens, kv_heads, k.shape[1]), jnp.float32)
    found = jax.lax.platform_dependent(rows, k, v, visible, owned, cpu=blocks, default=output)
    return found, weights, jnp.ones_like(weights[..., :1])


def _attend_blocks(rows, k, v, visible, owned, scale):
    """The output of `_attend_pages` for a rectangle, a block of slots at a time, corrected by the largest logit so far.

    (Milakov and Gimelshein, arXiv 1805.02867.)
    """
    kv_heads, group, tokens, _ = rows.shape
    slots = k.shape[1]
    visible = visible.swapaxes(0, 1)[:, None]
    used = jnp.where(visible.any((0, 1, 2)), iota(slots) + 1, 0).max()

    def body(carry):
        block, largest, total, summed = carry
        start = jnp.minimum(block * BLOCK, slots - BLOCK)  # the last block overlaps the one before
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK)
        own = part(visible, axis=3) & (start + iota(BLOCK) >= block * BLOCK)
        logits = jnp.where(own, product("hgtd,hcd->hgtc", rows, part(k, axis=1)) * scale, LEAST)
        new = jnp.maximum(largest, logits.max(-1, keepdims=True))
        weights, factor = jnp.where(own, jnp.exp(logits - new), 0.0), jnp.exp(largest - new)
        summed = summed * factor + _weighted("hgtc,hcd->hgtd", weights, part(v, axis=1))
        return block + 1, new, total * factor + weights.sum(-1, keepdims=True), summed

    full = partial(jnp.full, dtype=jnp.float32)
    least, none = full((kv_heads, group, tokens, 1), LEAST), full((kv_heads, group, tokens, 1), 0.0)
    start = jnp.int32(0), least, none, full(rows.shape, 0.0)
    _, _, total, summed = jax.lax.while_loop(lambda carry: carry[0] * BLOCK < used, body, start)
    return summed / jnp.where(total == 0.0, 1.0, total)


def _attend_pool(rows, k, v, visible, owned, scale):
    """All queries against all slots; what a slot's head did not ask is masked."""
    kv_heads, group, tokens, head_dim = rows.shape
    # Keys first: XLA on the CPU is faster that way.
    logits = product("cd,rd->cr", k, rows.reshape(-1, head_dim)).T.reshape(kv_heads, group, tokens, -1)
    logits = jnp.where(owned[:, None, None] & visible, logits * scale, LEAST)
    weights = jnp.exp(logits - _shift(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)
    output = _weighted("hgtc,cd->hgtd", weights, v) / total
    own = [(jnp.where(owned[h], weights[h], 0.0), jnp.where(owned[h], total[h], 0.0)) for h in range(kv_heads)]
    weights, total = (reduce(jnp.add, x) for x in zip(*own, strict=True))  # of the one head that owns a slot
    return output, weights, total


@broadcasts
def step(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""] | SupportsIndex,
    frequencies: Float[Array | np.ndarray, " pairs"] | None = None,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache]:
    """One chunk through one layer of one sequence: insert, attend, observe, evict.

    Numbers that are not finite stay in their row of a batch and in their head. A query that sees a key or a value that
    is not finite gets NaN (see `attend`, `corm_jax.cache.insert`); queries before it do not, nor do those after the
    key's eviction. To other heads it matters only where heads share: the slots of a pool that overflows, Ada-KV's
    budget, and TOVA's mean, in which it counts as 0.

    The outputs are differentiable with respect to ``q``, ``k``, ``v`` and what the cache holds; which keys are evicted
    is not, and counts as given.

    Args:
      policy, cache: the rule, and what it has kept so far, as `corm_jax.make_cache` returns it. If the policy waits for
        the end of the prompt, `corm_jax.begin_prompt` has to say how many tokens that has.
      q, k, v: the chunk's queries, keys and values, rotated at positions ``cache.seen + (0, 1, ...)``. Each query sees
        the live keys and, causally, the chunk.
      count: how many of them are real, from 0 to all; the rest pads a ragged batch, and changes nothing. So do tokens
        beyond the end of the clock, 2^31 - 1. A traced count that is not in that range counts as its nearest end.
      frequencies: for a policy that counts ``positions`` within the cache: radians a token for each pair of a head.
        Queries and keys then come unrotated.

    Returns:
      The outputs, in the dtype of ``q``, and the cache.

    Raises:
      CormError: for arguments whose shapes do not fit together, a cache of another policy, more tokens than the cache
        has slots, and without ``frequencies`` or an end of the prompt that the policy needs.

    >>> from corm_jax import CacheSpec, Corm, make_cache
    >>> policy = Corm(window=4, recent=2)
    >>> cache = make_cache(policy, CacheSpec(kv_heads=1, capacity=4, head_dim=8))
    >>> q, k = jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 8))
    >>> output, cache = step(policy, cache, q, k, k, count=3)
    >>> cache.position.tolist(), cache.state.tolist()      # all equal, so all important at t = 3
    ([[0, 1, 2, -1]], [[3, 3, 3, -2147483648]])
    """
    policy, count = narrow(policy), check_step(policy, cache, q, k, v, count, frequencies)
    count = jnp.minimum(count, ENDLESS - cache.seen)
    cache = cache._replace(state=jax.lax.stop_gradient(cache.state))  # decisions have no gradient
    index = iota(q.shape[0])
    position, real = cache.seen + index, index < count
    cache = cache_lib.insert(policy, cache, k, v, count)
    held, table = (cache, None) if cache.head is None or len(q) <= FEW else cache_lib.paged(cache)
    slots, keys = cache_lib.slots(held), held.k
    last = jnp.where(real, position, EMPTY).reshape(-1, *(1,) * held.position.ndim)  # what each query sees at most
    visible = slots.live & (slots.position <= last)
    if counts_in_cache(policy):
        if frequencies is None:
            raise CormError("the policy counts positions within the cache: give frequencies, and q and k unrotated")
        q, keys = _rotated_in_cache(q, keys, slots, position, frequencies)
    watched = "attention" in getattr(policy, "needs", EVERYTHING)
    output, observation = attend(q, keys, held.v, visible, position + 1, slots.owned, watched)
    state = policy.observe(held.state, jax.lax.stop_gradient(observation), slots)
    cache = cache_lib.learn(cache, state, table)
    return output, cache_lib.evict(policy, cache, count > 0)


def counts_in_cache(policy: Policy) -> bool:
    """Whether keys are rotated by their place within the cache, see `Policy`."""
    return getattr(policy, "positions", "original") == "cache"


def _rotated_in_cache(q, keys, slots: Slots, position, frequencies):
    """Queries and keys at the angles of their places among the live keys of their head."""
    before = slots.live & (slots.position < position.reshape(-1, *(1,) * slots.position.ndim))
    q = jax.vmap(rotate, in_axes=(1, 1, None), out_axes=1)(q, slots.total(before), frequencies)
    flat = rotate(keys.reshape(-1, keys.shape[-1]), slots.place().reshape(-1), frequencies)
    return q, flat.reshape(keys.shape)


@broadcasts
def read(
    policy: Policy,
    cache: LayerCache,
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    count: Int[Array, ""] | SupportsIndex,
    frequencies: Float[Array | np.ndarray, " pairs"] | None = None,
    *,
    chunk: SupportsIndex,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache, Int[Array, "chunks kv_heads"]]:
    """A block of tokens through one layer, ``chunk`` at a time: `step` under `jax.lax.scan`.

    Arguments as for `step`; ``chunk`` divides the number of tokens. Returns the outputs, the cache, and the number of
    live keys after each chunk.
    """
    count = check_step(policy, cache, q, k, v, count, frequencies)
    tokens, chunk = q.shape[0], integer("chunk", chunk)
    if tokens % chunk:
        raise CormError(f"chunk {chunk} does not divide a block of {tokens} tokens: pad the block, and say so in count")
    count, starts = jnp.asarray(count, jnp.int32), chunk * iota(tokens // chunk)

    def body(cache, xs):
        q, k, v, start = xs
        output, cache = step(policy, cache, q, k, v, jnp.clip(count - start, 0, chunk), frequencies)
        slots = cache_lib.slots(cache)
        return cache, (output, slots.total(slots.live))

    chunks = jax.tree.map(lambda x: x.reshape(tokens // chunk, chunk, *x.shape[1:]), (q, k, v))
    cache, (outputs, live) = jax.lax.scan(body, cache, (*chunks, starts), unroll=tokens == chunk)
    return outputs.reshape(q.shape), cache, live
