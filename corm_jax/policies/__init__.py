"""The policies, one a file; `registry` says which class a name means, `notation` how a command line names it."""

from corm_jax.core.options import choice, number, policy, size, static, weights
from corm_jax.policies.adakv import AdaKV
from corm_jax.policies.adaptive_corm import AdaptiveCorm
from corm_jax.policies.budget import Budget, budget, too_small
from corm_jax.policies.corm import Corm
from corm_jax.policies.full import Full
from corm_jax.policies.h2o import H2O
from corm_jax.policies.l2norm import L2Norm
from corm_jax.policies.notation import (
    COMBINATORS,
    Notation,
    default_spec,
    held_by,
    keeps_everything,
    keys_of,
    lacks_window,
    on_budget,
    parse,
    profile_of,
)
from corm_jax.policies.oneshot import Oneshot, oneshot
from corm_jax.policies.protect import Protect, protect
from corm_jax.policies.pyramidkv import PyramidKV
from corm_jax.policies.random import Random
from corm_jax.policies.recorder import Recorder, recorded
from corm_jax.policies.registry import POLICIES
from corm_jax.policies.scissorhands import Scissorhands
from corm_jax.policies.snapkv import SnapKV
from corm_jax.policies.streaming_llm import StreamingLLM
from corm_jax.policies.tova import TOVA
from corm_jax.policies.window import Window, of_layers

__all__ = [
    "COMBINATORS",
    "H2O",
    "POLICIES",
    "TOVA",
    "AdaKV",
    "AdaptiveCorm",
    "Budget",
    "Corm",
    "Full",
    "L2Norm",
    "Notation",
    "Oneshot",
    "Protect",
    "PyramidKV",
    "Random",
    "Recorder",
    "Scissorhands",
    "SnapKV",
    "StreamingLLM",
    "Window",
    "budget",
    "choice",
    "default_spec",
    "held_by",
    "keeps_everything",
    "keys_of",
    "lacks_window",
    "number",
    "of_layers",
    "on_budget",
    "oneshot",
    "parse",
    "policy",
    "profile_of",
    "protect",
    "recorded",
    "size",
    "static",
    "too_small",
    "weights",
]
