"""KV-cache eviction for JAX: CORM and its neighbours in a Flax decoder, as pure functions over static shapes.

>>> import corm_jax as cj
>>> policy = cj.Corm(window=256, recent=256)
"""

from corm_jax.attention import attend, step
from corm_jax.cache import begin_prompt, make_cache, usage
from corm_jax.checkpoint import load
from corm_jax.errors import CacheOverflowError, CheckpointError, CheckpointWarning, CormError
from corm_jax.generation import Generation, decode, generate, prefill, stream
from corm_jax.model import Config, Llama
from corm_jax.policies import (
    H2O,
    POLICIES,
    TOVA,
    AdaKV,
    AdaptiveCorm,
    Budget,
    Corm,
    Full,
    L2Norm,
    Oneshot,
    Protect,
    PyramidKV,
    Random,
    Scissorhands,
    SnapKV,
    StreamingLLM,
    budget,
    oneshot,
    parse,
    policy,
    protect,
)
from corm_jax.types import Caches, CacheSpec, LayerCache, Observation, Policy, Slots, Usage

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "AdaKV",
    "AdaptiveCorm",
    "Budget",
    "CacheOverflowError",
    "CacheSpec",
    "Caches",
    "CheckpointError",
    "CheckpointWarning",
    "Config",
    "Corm",
    "CormError",
    "Full",
    "Generation",
    "L2Norm",
    "LayerCache",
    "Llama",
    "Observation",
    "Oneshot",
    "Policy",
    "Protect",
    "PyramidKV",
    "Random",
    "Scissorhands",
    "Slots",
    "SnapKV",
    "StreamingLLM",
    "Usage",
    "attend",
    "begin_prompt",
    "budget",
    "decode",
    "generate",
    "load",
    "make_cache",
    "oneshot",
    "parse",
    "policy",
    "prefill",
    "protect",
    "step",
    "stream",
    "usage",
]
