"""Attention over slots: softmax of each query group over the slots that its head sees, in any layout."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arrays import broadcasts, iota, varying
from corm_jax.core.form import Form
from corm_jax.core.layout import Apart, Layout, product, weighted
from corm_jax.core.observation import Observation, observed

KEYS_PER_BLOCK = 512
"""Slots to which many queries attend at once if the policy does not need the weights. Does not change results."""

FEW = 8
"""Up to this many queries attend to all slots at once. Does not change results."""

PLAIN = Form()
"""Over all earlier keys, ``q . k / sqrt(head_dim)``."""

LEAST = float(np.finfo(np.float32).min)
"""The logit of a slot that is not seen: finite, so that differences of such logits are numbers. Its weight is 0."""


@broadcasts
def attend(
    q: Float[Array, "tokens kv_heads group head_dim"],
    k: Float[Array, "*slots head_dim"],
    v: Float[Array, "*slots head_dim"],
    visible: Bool[Array, "tokens *slots"],
    seen: Int[Array, " tokens"],
    layout: Layout | None = None,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], Observation]:
    """Softmax attention of each query group over its head's visible slots.

        l_i = q . k_i / sqrt(head_dim),   e_i = exp(l_i - max l),   output = sum_i e_i v_i / sum_i e_i

    Logits and weights are float32 whatever ``k`` and ``v`` hold, and so are products, in full (on a GPU not in TF32),
    but for 16-bit keys and values, whose products are exact and summed in float32. A query that sees nothing returns
    zeros.

    A slot that a query does not see has no effect on it: its key may be anything, and its value has to be finite, as
    the values of a cache are (`corm_jax.core.storing.stored`). If the softmax of a query is undefined, since a logit
    that it sees is NaN or +infinity, its output is NaN, and the policy observes weights of 0.

    The function is differentiable, forwards and backwards, with respect to ``q``, ``k`` and ``v``.

    Args:
      layout: which head each slot belongs to; None if store h belongs to head h.

    Returns:
      The output, in the dtype of ``q``, and the `Observation` for the policy, of which ``seen`` is a part.
    """
    layout = layout or Apart()
    weights, total = softmax(layout, PLAIN.logits(layout, q, k), visible)
    seen = seen[:, None, None]
    return output(layout, weights, total, v).astype(q.dtype), observed(layout, weights, total, visible, seen, k)


def softmax(
    layout: Layout, logits: Float[Array, "group tokens *slots"], visible: Bool[Array, "tokens *slots"]
) -> tuple[Float[Array, "group tokens *slots"], Float[Array, "group tokens kv_heads"]]:
    """Weights and their total over each head's slots: NaN if the softmax is undefined; 0 and 1 if nothing is seen."""
    logits = jnp.where(visible, logits, LEAST)
    top = layout.most(jax.lax.stop_gradient(logits))
    weights = jnp.exp(logits - layout.broadcast(jnp.where(top <= LEAST, 0.0, top)))
    total = layout.sum_per_head(weights)
    return weights, jnp.where(total == 0.0, 1.0, total)


def output(
    layout: Layout, weights: Array, total: Float[Array, "group tokens kv_heads"], v: Array
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """The mean of each head's values by these weights, float32."""
    return layout.weighted(weights, v) / total.transpose(1, 2, 0)[..., None]


def attended(
    layout: Layout, q: Array, k: Array, v: Array, visible: Array, live: Array, form: Form = PLAIN, bias: Any = None
) -> Array:
    """The output without weights, float32. On a CPU block by block, so that no array has the size tokens x slots.

    ``visible`` is false for slots that are not ``live``.
    """
    arguments = layout, q, k, v, visible, live, form.scale, form.softcap, bias
    if len(q) <= FEW or k.shape[1] <= KEYS_PER_BLOCK or bias is not None or not isinstance(layout, Apart):
        return _at_once(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=derived_from(_at_once, _by_blocks), default=_at_once)


def _at_once(layout, q, k, v, visible, live, scale, softcap, bias):
    form = Form(scale=scale, softcap=softcap)
    return output(layout, *softmax(layout, form.logits(layout, q, k, bias), visible), v)


def derived_from(plain, fast):
    """A ``fast`` way to compute what ``plain`` computes, with the derivatives of the latter: loops have none."""

    def derivative(primals, tangents):
        return jax.jvp(broadcasts(plain), primals, tangents)

    both = jax.custom_jvp(fast)
    both.defjvp(derivative)
    return both


def _by_blocks(layout, q, k, v, visible, live, scale, softcap, bias):
    """`attended`, a block of slots at a time, corrected by the largest logit so far, up to the last that is live.

    (Milakov and Gimelshein, arXiv 1805.02867.) Heads come first here, so that nothing is transposed.
    """
    slots, (tokens, kv_heads, group, head_dim) = k.shape[1], q.shape
    form, heads = Form(scale=scale, softcap=softcap), (kv_heads, group, tokens)
    rows, visible = q.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim), visible.swapaxes(0, 1)[:, None]
    used = jnp.where(live.any(0), iota(slots) + 1, 0).max()

    def body(carry):
        block, largest, total, summed = carry
        start = jnp.minimum(block * KEYS_PER_BLOCK, slots - KEYS_PER_BLOCK)  # the last block overlaps the one before
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=KEYS_PER_BLOCK)
        own = part(visible, axis=3) & (start + iota(KEYS_PER_BLOCK) >= block * KEYS_PER_BLOCK)
        here = form.of(product("hrd,hcd->hrc", rows, part(k, axis=1)), head_dim).reshape(*heads, KEYS_PER_BLOCK)
        here = jnp.where(own, here, LEAST)
        new = jnp.maximum(largest, here.max(-1))
        weights, factor = jnp.exp(here - new[..., None]), jnp.exp(largest - new)
        found = weighted("hrc,hcd->hrd", weights.reshape(kv_heads, -1, KEYS_PER_BLOCK), part(v, axis=1))
        summed = summed * factor[..., None] + found.reshape(summed.shape)
        return block + 1, new, total * factor + weights.sum(-1), summed

    # Logits that are seen exceed LEAST / 2, the start; those that are not weigh exp(LEAST - LEAST / 2) = 0.
    empty = jnp.full(heads, LEAST / 2), jnp.zeros(heads), jnp.zeros((*heads, v.shape[-1]))
    start = jnp.int32(0), *varying(tuple(x.astype(jnp.float32) for x in empty), q, k, v, visible)
    _, _, total, summed = jax.lax.while_loop(lambda carry: carry[0] * KEYS_PER_BLOCK < used, body, start)
    return (summed / jnp.where(total == 0.0, 1.0, total)[..., None]).transpose(2, 0, 1, 3)
