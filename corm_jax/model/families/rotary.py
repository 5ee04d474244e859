"""Rotary positions as ``config.json`` describes them, with every kind of scaling."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, model_validator

from corm_jax.core.positions import Rope
from corm_jax.model.families.family import Family, head_size
from corm_jax.model.schema import Count, Number, Schema, missing

Kind = Literal["default", "linear", "dynamic", "yarn", "longrope", "su", "llama3"]


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"must be more than 0 and at most 1, not {value!r}")
    return value


Share = Annotated[float, AfterValidator(_share)]

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ALLOWED = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
"""Keys that each kind of scaling needs, and those that it may have besides."""


class Scaling(Schema):
    """What stands in ``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""

    rope_type: Kind = missing()
    type: Kind = missing()
    rope_theta: Number = missing()
    partial_rotary_factor: Share = missing()
    factor: Number | None = None
    low_freq_factor: Number = missing()
    high_freq_factor: Number = missing()
    original_max_position_embeddings: Count = missing()
    attention_factor: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool = missing()
    short_factor: list[Number] = missing()
    long_factor: list[Number] = missing()

    @model_validator(mode="after")
    def _one_type(self) -> "Scaling":
        if self.rope_type and self.type and self.rope_type != self.type:
            raise ValueError(f"'rope_type' = {self.rope_type!r} and 'type' = {self.type!r} contradict each other")
        return self

    @property
    def kind(self) -> str:
        """The kind of scaling; ``su`` is what LongRoPE was called first."""
        kind = self.rope_type or self.type or "default"
        return "longrope" if kind == "su" else kind

    def check(self, where: str, original: int | None) -> None:
        """Raises for keys that the kind of scaling needs and that are missing, or that it does not know."""
        found = self.model_dump(exclude={"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        found["original_max_position_embeddings"] = original
        for key, value in found.items():
            if value is None and key in NEEDED[self.kind]:
                raise ValueError(f"{where!r} has no {key!r}, which rope type {self.kind!r} needs")
            if value is not None and key not in NEEDED[self.kind] + ALLOWED.get(self.kind, ()):
                if key == "original_max_position_embeddings" and self.kind == "dynamic":
                    continue  # transformers scales from max_position_embeddings
                raise ValueError(f"{key!r} = {value} has no meaning for rope type {self.kind!r}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"'{where}.low_freq_factor' = {self.low_freq_factor} is not below "
                f"'high_freq_factor' = {self.high_freq_factor}"
            )


def amplitude(scaling: Scaling, factor: Any, original: Any) -> float:
    """By what YaRN and LongRoPE multiply queries and keys: arXiv 2309.00071, section 3.4; 2402.13753's code."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if factor <= 1:
        return 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * math.log(factor) + 1) / (0.1 * scaling.mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


class Rotated(Family):
    """A family with rotary positions, grouped queries, RMSNorm and a gated feed-forward, or some of these."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = missing(2048)
    rope_theta: Number = missing()
    rope_scaling: Scaling | None = None
    rope_parameters: Scaling | None = None
    partial_rotary_factor: Share = missing()
    original_max_position_embeddings: Count = missing()

    rotates_part: ClassVar[bool] = False
    """Whether transformers follows ``partial_rotary_factor`` for this family."""

    says_original: ClassVar[bool] = False
    """Whether ``original_max_position_embeddings`` is there without any scaling, too."""

    @model_validator(mode="after")
    def _shape(self) -> "Rotated":
        width = self.width
        rope = self.rope
        if rope.dim(width) % 2 or not rope.dim(width):
            raise ValueError(
                "'head_dim' (or else 'hidden_size' / 'num_attention_heads') = "
                f"{width} is odd: rotary positions turn pairs"
                if rope.rotated == 1
                else f"'head_dim' = {width}, of which {rope.dim(width)} are rotated: rotary positions turn pairs"
            )
        for name, factors in (("short_factor", rope.divisors), ("long_factor", rope.longer)):
            if factors and len(factors) != rope.dim(width) // 2:
                raise ValueError(
                    f"{name!r} has {len(factors)} numbers, where {rope.dim(width) // 2} are expected: one for each pair"
                )
        return self

    @property
    def width(self) -> int:
        """Numbers in the key of one head."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads and heads % kv_heads:
            raise ValueError(f"'num_attention_heads' = {heads} is no multiple of 'num_key_value_heads' = {kv_heads}")
        return self.head_dim or head_size(self.hidden_size, heads)

    @property
    def rope(self) -> Rope:
        """The frequencies, from whichever of three places has them; where two differ, that is an error."""
        spellings = {
            key: self._rope(key, value)
            for key in ("rope_parameters", "rope_scaling")
            if (value := getattr(self, key)) is not None and value.model_fields_set
        }
        if len(set(spellings.values())) > 1:
            raise ValueError(
                "'rope_parameters' and 'rope_scaling' contradict each other: "
                + " and ".join(str(getattr(self, key).model_dump(exclude_unset=True)) for key in spellings)
            )
        return next(iter(spellings.values()), None) or self._rope("rope_parameters", Scaling())

    def _rope(self, where: str, scaling: Scaling) -> Rope:
        def either(key: str) -> Any:
            inside, outside = getattr(scaling, key), getattr(self, key)
            if inside is not None and outside is not None and inside != outside:
                raise ValueError(f"'{where}.{key}' = {inside} and {key!r} = {outside} contradict each other")
            return outside if inside is None else inside

        original: Any = either("original_max_position_embeddings")
        kind = scaling.kind
        if kind == "default" and self.says_original:
            original = None
        scaling.check(where, original)
        theta, share = either("rope_theta"), either("partial_rotary_factor")
        if share not in (None, 1) and not self.rotates_part:
            raise ValueError(f"'partial_rotary_factor' = {share} is not supported for {self.model_type!r}: only 1 is")
        rope = Rope(theta=Rope().theta if theta is None else theta, rotated=1.0 if share is None else share)
        if kind == "linear":
            return rope._replace(kind="linear", factor=scaling.factor)
        if kind == "dynamic":
            return rope._replace(kind="dynamic", factor=scaling.factor, original_context=self.max_position_embeddings)
        if kind == "llama3":
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            return rope._replace(
                kind="llama3",
                factor=scaling.factor,
                low_freq_factor=low,
                high_freq_factor=high,
                original_context=original,
            )
        if kind == "yarn":
            betas = {key: getattr(scaling, key) for key in ("beta_fast", "beta_slow") if getattr(scaling, key)}
            return rope._replace(
                kind="yarn",
                factor=scaling.factor,
                original_context=original,
                truncated=scaling.truncate is not False,
                amplitude=amplitude(scaling, scaling.factor, original),
                **betas,
            )
        if kind == "longrope":
            factor = scaling.factor or self.max_position_embeddings / original
            return rope._replace(
                kind="divisors",
                divisors=tuple(scaling.short_factor),
                longer=tuple(scaling.long_factor),
                original_context=original,
                amplitude=amplitude(scaling, factor, original),
            )
        return rope
