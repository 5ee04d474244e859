"""Architectures with LayerNorm and biases: GPT-2, GPT-NeoX (Pythia), BLOOM."""

from collections.abc import Mapping
from typing import Any, ClassVar

from corm_jax.model.architectures.architecture import LAYER, LAYERS, MODEL, QKV, Architecture, Rotated, under
from corm_jax.model.places import Names
from corm_jax.model.schema import Number

BIASES = {"qkv_bias": True, "out_bias": True, "feed_forward_bias": True}


class GPT2(Architecture, alias_generator=under("gpt2")):
    """GPT-2: learned positions."""

    layer_norm_eps: Number

    names: ClassVar[Names] = Names(MODEL | {"learned": "position_embd"}, LAYER, LAYERS, fused=QKV)

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        norm = {"norm": "layer", "norm_eps": self.layer_norm_eps}
        return {**norm, **BIASES, "activation": "gelu_tanh", "gated": False, "rope": None, "learned": True}


class GPTNeoX(Rotated, alias_generator=under("gptneox")):
    """GPT-NeoX and Pythia: a part of each head is rotated, attention and feed-forward side by side.

    GELU is that of the model, by the error function, which llama.cpp approximates.
    """

    layer_norm_eps: Number
    parallel: bool

    names: ClassVar[Names] = Names(MODEL, LAYER, LAYERS, fused=QKV)
    partly: ClassVar[bool] = True

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        norm = {"norm": "layer", "norm_eps": self.layer_norm_eps, "parallel": self.parallel}
        return {**norm, **BIASES, "activation": "gelu", "gated": False, "rope": self.rope()}


class Bloom(Architecture, alias_generator=under("bloom")):
    """BLOOM: ALiBi, a norm of the embedding."""

    layer_norm_eps: Number

    names: ClassVar[Names] = Names(MODEL | {"embedding_norm": "token_embd_norm"}, LAYER, LAYERS, fused=QKV)

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        norm = {"norm": "layer", "norm_eps": self.layer_norm_eps, "embedding_norm": True}
        return {**norm, **BIASES, "activation": "gelu_tanh", "gated": False, "rope": None, "alibi": True}
