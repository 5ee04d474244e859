"""The policies, one a file, and the ``name:key=value,...`` notation in which a command line names them."""

import dataclasses
from typing import Any

from corm_jax.errors import CormError
from corm_jax.policies.corm import Corm
from corm_jax.policies.full import Full
from corm_jax.types import Policy

POLICIES: dict[str, type[Any]] = {"full": Full, "corm": Corm}


def parse(spec: str) -> Policy:
    """The policy that a SPEC names.

    >>> parse("corm:window=64,recent=32,group=mean")
    Corm(window=64, recent=32, threshold='position', group='mean', eager=False)

    Raises:
      CormError: for an unknown policy or option, or a value out of range.
    """
    name, _, rest = spec.strip().partition(":")
    if name not in POLICIES:
        raise CormError(f"unknown policy {name!r} in {spec!r}: choose from {', '.join(POLICIES)}")
    fields = {field.name: field for field in dataclasses.fields(POLICIES[name])}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in fields or not equals:
            known = ", ".join(f"{option}=..." for option in fields) or "none"
            raise CormError(f"unknown option {item.strip()!r} in {spec!r}: {name} has {known}")
        if key in options:
            raise CormError(f"option {key!r} is given twice in {spec!r}")
        options[key] = _value(fields[key], text, spec)
    try:
        return POLICIES[name](**options)
    except CormError as error:
        raise CormError(f"{error} (in {spec!r})") from None


def _value(field: dataclasses.Field, text: str, spec: str) -> Any:
    if choices := field.metadata.get("choices"):
        if text in choices:
            return text
        expected = " or ".join(choices)
    elif isinstance(field.default, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        expected = "true or false"
    else:
        kind = type(field.default)
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
    raise CormError(f"{field.name} must be {expected}, not {text!r} (in {spec!r})")


__all__ = ["POLICIES", "Corm", "Full", "parse"]
