"""Schemas that know what was consumed: what a file says and nothing reads is an error that names it."""

import reprlib
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Schema(BaseModel):
    """A mapping of keys to values in which each key is a field, harmless, empty, or an error."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True, protected_namespaces=())

    only: ClassVar[dict[str, tuple]] = {}
    """Keys that are no fields, in their `short` form, each with the values that say what the decoder does anyway."""

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        return False

    @classmethod
    def short(cls, key: str) -> str:
        """A key as `only` has it."""
        return key

    @model_validator(mode="after")
    def _nothing_is_left(self) -> "Schema":
        for key, value in (self.model_extra or {}).items():
            if self.harmless(key) or value is None or (isinstance(value, str | list | dict) and not value):
                continue
            short = self.short(key)
            if short not in self.only:
                raise ValueError(
                    f"{key[:100]!r} = {reprlib.repr(value)} is unknown here and may change the numbers "
                    "(remove the key if it does not)"
                )
            if value not in self.only[short]:
                supported = " or ".join(map(repr, self.only[short]))
                raise ValueError(f"{key!r} = {reprlib.repr(value)} is not supported: only {supported} is")
        return self


def _number(value: float) -> float:
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"must be a positive number between 1e-30 and 1e30, not {value!r}")
    return value


def _count(value: int) -> int:
    if not 0 < value < 2**31:
        raise ValueError(f"must be a positive whole number below 2 ** 31, not {str(value)[:40]}")
    return value


Number = Annotated[float, AfterValidator(_number)]
"""A positive number that float32 can hold."""

Count = Annotated[int, AfterValidator(_count)]
"""A positive int32."""


def missing(default: Any = None, **options: Any) -> Any:
    """A field that may be left out; unlike ``| None``, a null is not accepted."""
    return Field(default=default, **options)
