"""Attention over a pool in one pass, for GPUs: keys, values and their heads are read once, and no logits are kept.

XLA reads and writes a number for each query head and slot several times over, which for as many heads as Llama 2 has
takes longer than the keys. Here a program takes a stretch of the pool and, a block of slots at a time, corrects what it
has summed so far by the new largest logit (Milakov and Gimelshein, arXiv 1805.02867); the stretches are put together
at the end (as in Flash-Decoding, https://pytorch.org/blog/flash-decoding). Written in Pallas, compiled by Triton.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

from corm_jax.types import broadcasts, iota

BLOCK = 64
"""Slots at a time."""

STRETCHES = 128
"""The most programs a sequence: about as many as a large GPU has processors."""

LOWEST = -1e30  # instead of -inf, whose differences are not numbers


def supports(rows: Array, k: Array) -> bool:
    """Whether the kernel can do it: one token, and heads whose length is a power of two that Triton multiplies."""
    _, _, tokens, head_dim = rows.shape
    return tokens == 1 and head_dim >= 16 and head_dim & (head_dim - 1) == 0 and k.dtype.itemsize in (2, 4)


@broadcasts
def attend_pool(
    rows: Float[Array, "kv_heads group 1 head_dim"],
    k: Float[Array, "pool head_dim"],
    v: Float[Array, "pool head_dim"],
    visible: Bool[Array, "1 pool"],
    owned: Bool[Array, "kv_heads pool"],
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "kv_heads group 1 head_dim"], Float[Array, "group 1 pool"], Float[Array, "group 1 pool"]]:
    """What `corm_jax.attention.attend` needs of a pool: output, weights and totals, all float32.

        l_i = q . k_i scale,   m = max l,   output = sum_i exp(l_i - m) v_i / sum_i exp(l_i - m)

    Args:
      interpret: runs the kernel without a GPU, slowly.
    """
    kv_heads, group, _, head_dim = rows.shape
    pool, heads = len(k), kv_heads * group
    padded = max(16, pl.next_power_of_2(heads))  # rows of queries, the least that tensor cores multiply
    stretch = BLOCK * max(4, pl.cdiv(pl.cdiv(pool, STRETCHES), BLOCK))
    parts = pl.cdiv(pool, stretch)
    q = jnp.zeros((padded, head_dim), k.dtype).at[:heads].set(rows.reshape(heads, head_dim).astype(k.dtype))
    head = jax.lax.argmax(owned, 0, jnp.int32)
    whose = jnp.where(visible[0], head, -1)
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    logits, largest, total, summed = pl.pallas_call(
        partial(_kernel, group=group, heads=heads, stretch=stretch, scale=scale),
        grid=(parts,),
        out_shape=[
            float32((group, pool)),
            float32((parts, padded)),
            float32((parts, padded)),
            float32((parts, padded, head_dim)),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attend_pool",
    )(q, k, v, whose)
    of_all = largest.max(0)
    factor = jnp.exp(largest - of_all)
    total = (total * factor).sum(0)[:heads].reshape(kv_heads, group)
    total = jnp.where(total == 0.0, 1.0, total)
    summed = (summed * factor[..., None]).sum(0)[:heads].reshape(kv_heads, group, head_dim)
    of_all = of_all[:heads].reshape(kv_heads, group)
    weights = jnp.where(visible, jnp.exp(logits - of_all.T[:, head]), 0.0)
    return (summed / total[..., None])[:, :, None], weights[:, None], total.T[:, head][:, None]


def _kernel(
    q_ref, k_ref, v_ref, whose_ref, logits_ref, largest_ref, total_ref, summed_ref, *, group, heads, stretch, scale
):
    """One stretch of the pool: what its slots say to the queries of their heads, and what that sums up to."""
    part, pool = pl.program_id(0), k_ref.shape[0]
    q = q_ref[...]
    row = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], BLOCK), 0)
    dot = partial(triton.dot, allow_tf32=False)

    def body(block, carry):
        largest, total, summed = carry
        start = part * stretch + block * BLOCK
        slots, inside = pl.ds(start, BLOCK), start + iota(BLOCK) < pool
        k = triton.load(k_ref.at[slots, :], mask=inside[:, None], other=0.0)
        whose = triton.load(whose_ref.at[slots], mask=inside, other=-1)
        logits = dot(q, k.T) * scale
        own = (row // group == whose[None]) & (row < heads)
        for member in range(group):
            said = jnp.where(own & (row % group == member), logits, 0.0).sum(0)
            triton.store(logits_ref.at[pl.ds(member, 1), slots], said[None], mask=inside[None])
        logits = jnp.where(own, logits, LOWEST)
        new = jnp.maximum(largest, logits.max(1))
        weights = jnp.where(own, jnp.exp(logits - new[:, None]), 0.0)
        factor = jnp.exp(largest - new)
        v = triton.load(v_ref.at[slots, :], mask=inside[:, None], other=0.0)
        summed = summed * factor[:, None] + dot(weights.astype(v.dtype), v)
        return new, total * factor + weights.sum(1), summed

    full = partial(jnp.full, dtype=jnp.float32)
    nothing = full(q.shape[0], LOWEST), full(q.shape[0], 0.0), full(q.shape, 0.0)
    blocks = jnp.minimum(stretch // BLOCK, jax.lax.div(pool - part * stretch + (BLOCK - 1), jnp.int32(BLOCK)))
    largest, total, summed = jax.lax.fori_loop(0, blocks, body, nothing)
    largest_ref[part, :] = largest
    total_ref[part, :] = total
    summed_ref[part, :, :] = summed
