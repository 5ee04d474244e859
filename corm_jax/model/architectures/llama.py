"""LLaMA and the architectures that differ little from it: Qwen 2, Qwen 3, Phi-3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from corm_jax.model.architectures.architecture import LAYER, LAYERS, MODEL, NORMS, QKV, Rotated, under
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, missing

NAMES = Names(MODEL, LAYER, LAYERS)


class _Llamas(Rotated):
    norm_eps: Number

    names: ClassVar[Names] = NAMES

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        return {"norm_eps": self.norm_eps, "rope": self.rope(*divisors.values())}


class Llama(_Llamas, alias_generator=under("llama")):
    """Llama 2 and 3, Mistral, Vicuna, SmolLM2. Llama 3's scaling of frequencies is a tensor of divisors."""

    interleaved: ClassVar[bool] = True
    divisors: ClassVar[tuple[str, ...]] = ("rope_freqs.weight",)


class Qwen2(_Llamas, alias_generator=under("qwen2")):
    """Qwen 2 and 2.5: queries, keys and values have a bias."""

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        return {**super().own(divisors), "qkv_bias": True}


class Qwen3(_Llamas, alias_generator=under("qwen3")):
    """Qwen 3: queries and keys are normalised."""

    names: ClassVar[Names] = replace(NAMES, layer=LAYER | NORMS)

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        return {**super().own(divisors), "qk_norm": True}


SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"


class Phi3(_Llamas, alias_generator=under("phi3")):
    """Phi-3 and Phi-4: q, k, v in one tensor, gate and up in one, a window, LongRoPE.

    The window is that of the model, which llama.cpp passes over.
    """

    window: int = missing(0, ge=0)
    original_context: Count = missing()
    amplitude: Number = missing(1.0)

    names: ClassVar[Names] = replace(NAMES, fused=QKV | {"ffn_up": ("feed_forward.gate", "feed_forward.up")})
    divisors: ClassVar[tuple[str, ...]] = (SHORT, LONG)
    partly: ClassVar[bool] = True

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        rope = self.rope(divisors.get(SHORT, ()))
        if divisors:
            longer = tuple(self.linear * one for one in divisors[LONG])
            rope = rope._replace(longer=longer, original_context=self.original_context or self.context)
        windows = (self.window,) * self.layers if self.window else ()
        return {"norm_eps": self.norm_eps, "rope": rope._replace(amplitude=self.amplitude), "windows": windows}
