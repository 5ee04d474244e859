"""KV-cache eviction for JAX: CORM and its neighbours in a Flax decoder, as pure functions over static shapes.

>>> import corm_jax as cj
>>> policy = cj.Corm(window=256, recent=256)
"""

from corm_jax import adapters
from corm_jax.core.attention import attend
from corm_jax.core.cache import make_cache, usage
from corm_jax.core.capacity import per_layer
from corm_jax.core.observation import Observation
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.positions import ALiBi, Hybrid, Rope, Rotary
from corm_jax.core.prompt import begin_prompt, end_prompt
from corm_jax.core.sharding import partition_specs
from corm_jax.core.slots import Slots
from corm_jax.core.step import look, read, step
from corm_jax.core.types import Caches, CacheSpec, Clock, LayerCache, OfHead, Usage
from corm_jax.errors import CacheOverflowError, CheckpointError, CheckpointWarning, CormError
from corm_jax.model.checkpoint import load
from corm_jax.model.decoder import Decoder, Shape, make_caches
from corm_jax.model.generation import Generation, decode, generate, prefill, stream
from corm_jax.model.transformer import Config, Transformer
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
    Recorder,
    Scissorhands,
    SnapKV,
    StreamingLLM,
    Window,
    budget,
    of_layers,
    oneshot,
    parse,
    policy,
    protect,
    recorded,
)

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "ALiBi",
    "AdaKV",
    "AdaptiveCorm",
    "Budget",
    "CacheOverflowError",
    "CacheSpec",
    "Caches",
    "CheckpointError",
    "CheckpointWarning",
    "Clock",
    "Config",
    "Corm",
    "CormError",
    "Decoder",
    "Full",
    "Generation",
    "Hybrid",
    "L2Norm",
    "LayerCache",
    "Observation",
    "OfHead",
    "Oneshot",
    "Policy",
    "Protect",
    "PyramidKV",
    "Random",
    "Recorder",
    "Rope",
    "Rotary",
    "Scissorhands",
    "Shape",
    "Slots",
    "SnapKV",
    "StreamingLLM",
    "Traits",
    "Transformer",
    "Usage",
    "Window",
    "adapters",
    "attend",
    "begin_prompt",
    "budget",
    "decode",
    "end_prompt",
    "generate",
    "load",
    "look",
    "make_cache",
    "make_caches",
    "of_layers",
    "oneshot",
    "parse",
    "partition_specs",
    "per_layer",
    "policy",
    "prefill",
    "protect",
    "read",
    "recorded",
    "step",
    "stream",
    "usage",
]
