"""A layer of a cache, driven token by token or chunk by chunk, beside the same of the specification."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core import cache
from corm_jax.core.arrays import ENDLESS
from corm_jax.core.prompt import begin_prompt
from corm_jax.core.step import step
from corm_jax.core.types import CacheSpec
from simulator.held import by_head
from simulator.reading import read_layer
from simulator.specification import rule_of

TOKENS, CHUNK, KV_HEADS, GROUP, HEAD_DIM = 20, 3, 2, 2, 4
FUSED = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
"""With these options a program is compiled as outside of the tests, see tests/conftest.py."""

SHAPES = (TOKENS, KV_HEADS, GROUP, HEAD_DIM), (TOKENS, KV_HEADS, HEAD_DIM), (TOKENS, KV_HEADS, HEAD_DIM)


def normal(seed, scale=2.0):
    """Queries, keys and values of a layer: no two logits are equal."""
    rng = np.random.default_rng(seed)
    return tuple((factor * rng.normal(size=shape)).astype(np.float32) for factor, shape in zip((scale, 1, 1), SHAPES))  # noqa: B905


def at_clock(layer, **fields):
    """A cache whose clock shows something else."""
    return layer._replace(clock=replace(layer.clock, **fields))


def in_cache(policy, q, k, v, counts, *, capacity=TOKENS + CHUNK, stores=None, prompts=None, start=0, step=step):
    """Outputs ``[tokens, ...]``, the keys of each head after each step, and the cache at the end.

    Args:
      counts: tokens of each step: all at most 1, or at most CHUNK.
      stores: sets of slots; None: one for each head.
      prompts: the clock at which a prompt ends, by the clock at which it begins.
      start: what the clock shows before the first token.
      step: what reads; `corm_jax.step`, or that with more arguments.
    """
    counts, chunk = np.array(counts, np.int32), max(1, *counts)
    clock = start + counts.cumsum() - counts
    ends = [max((begin, end) for begin, end in (prompts or {}).items() if begin <= t)[1] if prompts else ENDLESS
            for t in clock]  # fmt: skip
    padded = (np.concatenate([x, np.full((CHUNK, *x.shape[1:]), 7, x.dtype)]) for x in (q, k, v))
    chunk, static = (1 if chunk == 1 else CHUNK), {"capacity": capacity, "stores": stores, "step": step}
    ends = np.array(ends, np.int32)
    outputs, position, last = _in_cache(policy, *padded, counts, ends, np.int32(start), chunk=chunk, **static)
    rows = np.concatenate([out[:count] for out, count in zip(np.asarray(outputs), counts, strict=True)])
    held = [[{int(p) for p in slots if p >= 0} for slots in head] for head in np.asarray(position).swapaxes(0, 1)]
    return rows, held, last


@partial(jax.jit, static_argnames=("chunk", "capacity", "stores", "step"))
def _in_cache(policy, q, k, v, counts, ends, start, *, chunk, capacity, stores, step):
    layer = cache.make_cache(policy, CacheSpec(k.shape[1], capacity, k.shape[2], k.dtype, stores))
    layer = begin_prompt(layer, 1)  # where it really ends is set below, before each step

    def body(carry, xs):
        layer, at = carry
        count, prompt = xs
        pieces = (jax.lax.dynamic_slice_in_dim(x, at, chunk) for x in (q, k, v))
        output, layer = step(policy, at_clock(layer, prompt=prompt), *pieces, count)
        return (layer, at + count), (output, by_head(layer))

    (layer, _), (outputs, position) = jax.lax.scan(body, (at_clock(layer, seen=start), jnp.int32(0)), (counts, ends))
    return outputs, position, layer


def in_numpy(policy, q, k, v, counts, *, capacity=None, stores=None, prompts=None, **how):
    """The readings of the specification, head by head."""
    heads = [rule_of(policy, head) for head in range(q.shape[1])]
    how |= {"capacity": capacity, "stores": stores}
    return read_layer(heads, q, k, v, chunks=counts, prompt=prompts or {}, **how)
