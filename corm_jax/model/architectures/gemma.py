"""Gemma 2 and 3: norms around attention and feed-forward, soft caps, local layers beside global ones."""

from collections.abc import Mapping
from typing import Any, ClassVar

from corm_jax.core.positions import Rope
from corm_jax.model.architectures.architecture import LAYER, LAYERS, MODEL, NORMS, Rotated, under
from corm_jax.model.places import Names
from corm_jax.model.schema import Count, Number, missing

_LAYER = LAYER | {"after_attention": "post_attention_norm", "after_feed_forward": "post_ffw_norm"}


class _Gemma(Rotated):
    norm_eps: Number
    window: Count
    every: Count

    largest: ClassVar[int]
    """How many layers the model of 27B has, whose queries have another scale, which no key says."""

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        scaled = self.dim // self.heads if self.layers == self.largest else self.head_dim
        local = (self.window,) * (self.every - 1)
        return {
            "windows": ((*local, None) * self.layers)[: self.layers] if local else (),
            "norm_eps": self.norm_eps,
            "norm_after": True,
            "activation": "gelu_tanh",
            "rope": self.rope(),
            "embedding_scale": self.dim**0.5,
            "attention_scale": scaled**-0.5,
        }


class Gemma2(_Gemma, alias_generator=under("gemma2")):
    """Gemma 2: every second layer is global; soft caps."""

    window: Count = missing(4096)
    every: Count = missing(2)
    softcap: Number = missing(30.0)
    attention_softcap: Number = missing(50.0)

    names: ClassVar[Names] = Names(MODEL, _LAYER, LAYERS)
    largest: ClassVar[int] = 46

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        return {**super().own(divisors), "softcap": self.softcap, "attention_softcap": self.attention_softcap}

    def assumed(self) -> dict[str, Any]:
        fields = ("window", "softcap", "attention_softcap")
        said = {self.key(field): getattr(self, field) for field in fields if field not in self.model_fields_set}
        return super().assumed() | said


class Gemma3(_Gemma, alias_generator=under("gemma3")):
    """Gemma 3: norms of queries and keys, every sixth layer global, two rotary bases; factors are for global layers."""

    every: Count = missing(6)
    local_theta: Number = missing(10000.0)

    names: ClassVar[Names] = Names(MODEL, _LAYER | NORMS, LAYERS)
    largest: ClassVar[int] = 62

    def own(self, divisors: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
        return {**super().own(divisors), "qk_norm": True, "local_rope": Rope(theta=self.local_theta)}
