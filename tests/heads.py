"""Hypothesis strategies for small attention heads, and what the tests do with them."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.layout import Apart, Shared
from corm_jax.core.slots import Slots
from simulator import rules
from simulator.reading import read_head

TOKENS = 20  # every head is padded to this, so that one compile serves all examples of a shape
HEAD_DIM = 4


@st.composite
def heads(draw, group=None):
    """Queries, keys and values of one key-value head. Small whole numbers, so that equal logits are exactly equal."""
    tokens, group = draw(st.integers(1, TOKENS)), group or draw(st.integers(1, 3))
    seed, peak = draw(st.integers(0, 2**16)), draw(st.integers(0, 4))
    rng = np.random.default_rng(seed)
    q = rng.integers(-peak, peak + 1, (tokens, group, HEAD_DIM)).astype(np.float32)
    k = rng.integers(-2, 3, (tokens, HEAD_DIM)).astype(np.float32)
    v = rng.integers(-2, 3, (tokens, HEAD_DIM)).astype(np.float32)
    return q, k, v


@st.composite
def options(draw):
    """Hyperparameters of CORM, each choice with its default first."""
    return {
        "window": draw(st.integers(1, TOKENS + 2)),
        "recent": draw(st.integers(1, 6)),
        "multiple": draw(st.integers(1, 4)),
        "threshold": draw(st.sampled_from(["position", "live"])),
        "group": draw(st.sampled_from(["any", "mean"])),
        "eager": draw(st.booleans()),
    }


def partitions(tokens):
    """Ways to cut a sequence into chunks: chunks of B, or the whole prompt at once and then single tokens."""
    return st.one_of(
        st.integers(1, 5).map(lambda size: chunks_of(tokens, size)),
        st.integers(1, tokens).map(lambda prompt: [prompt] + [1] * (tokens - prompt)),
    )


def chunks_of(tokens, size):
    return [min(size, tokens - start) for start in range(0, tokens, size)]


def corm_last(q, k, v, *, chunks=None, capacity=None, **options):
    """The specification of CORM with one number a key, for one head."""
    return read_head(rules.Corm(**options), q, k, v, chunks=chunks, capacity=capacity)


def padded(x, multiple):
    """Pads the token axis with garbage to TOKENS rounded up: what pads must not matter."""
    length = -(-TOKENS // multiple) * multiple
    return np.concatenate([x, np.full((length - x.shape[0], *x.shape[1:]), 7.0, np.float32)])


def live_sets(position):
    """The positions that one head's slots hold."""
    return {int(p) for p in position if p >= 0}


def slots_of(position, owner=None, seen=30, prompt=ENDLESS, heads=2):
    """The view of a rectangle ``[kv_heads, slots]``, or of a pool ``[slots]`` with the head that owns each slot."""
    position = jnp.asarray(position, jnp.int32)
    if owner is None:
        return Slots(position, jnp.int32(seen), jnp.int32(prompt), Apart())
    layout = Shared(jnp.asarray(owner, jnp.int32)[None], heads)
    return Slots(position[None], jnp.int32(seen), jnp.int32(prompt), layout)
