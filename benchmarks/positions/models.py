"""The five models: they differ in how positions enter attention, and in nothing else."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

import corm_jax as cj

KINDS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "alibi": {"rope": None, "alibi": True},
    "learned": {"rope": None, "learned": True},
    "none": {"rope": None},
    "hybrid": {"alibi": True},
}
"""What each kind changes in a LLaMA. The hybrid rotates queries and keys, and adds ALiBi's bias to the logits."""


def config_of(kind: str, size: dict[str, int]) -> cj.Config:
    """The shape of a model; ``size`` has vocab, dim, hidden, layers, heads and context."""
    heads = size["heads"]
    return cj.Config(**size, kv_heads=heads, head_dim=size["dim"] // heads, tied=True, **KINDS[kind])


def build(kind: str, size: dict[str, int], seed: int, dtype: Any = jnp.float32) -> cj.Transformer:
    """A model with random weights."""
    return cj.Transformer(config_of(kind, size), dtype=dtype, rngs=nnx.Rngs(seed))
