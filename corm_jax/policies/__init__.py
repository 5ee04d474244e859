"""The policies, one a file, and the ``name:key=value,...`` notation in which a command line names them."""

import dataclasses
from typing import Any

from corm_jax.core.options import choice, number, policy, size, static, weights
from corm_jax.core.policy import Policy
from corm_jax.errors import CormError
from corm_jax.policies.adakv import AdaKV
from corm_jax.policies.adaptive_corm import AdaptiveCorm
from corm_jax.policies.budget import Budget, budget
from corm_jax.policies.corm import Corm
from corm_jax.policies.full import Full
from corm_jax.policies.h2o import H2O
from corm_jax.policies.l2norm import L2Norm
from corm_jax.policies.oneshot import Oneshot, oneshot
from corm_jax.policies.profile import Profile
from corm_jax.policies.protect import Protect, protect
from corm_jax.policies.pyramidkv import PyramidKV
from corm_jax.policies.random import Random
from corm_jax.policies.recorder import Recorder, recorded
from corm_jax.policies.scissorhands import Scissorhands
from corm_jax.policies.snapkv import SnapKV
from corm_jax.policies.streaming_llm import StreamingLLM
from corm_jax.policies.tova import TOVA

POLICIES: dict[str, type[Any]] = {
    "full": Full,
    "corm": Corm,
    "adaptive_corm": AdaptiveCorm,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "scissorhands": Scissorhands,
    "tova": TOVA,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "l2norm": L2Norm,
    "random": Random,
}

SELF_SIZED = ("corm", "adaptive_corm")
"""Those that decide by themselves how many keys stay."""

RANKING = ("streaming_llm", "h2o", "tova", "l2norm", "random")
"""Those that only rank keys: without a budget they evict nothing before the slots run out."""

COMBINATORS = {
    "budget": "keys of a head that stay at most, as in 512, or a share of those seen, as in 0.25",
    "sinks": "first tokens that never go",
    "recent": "newest tokens that never go",
    "oneshot": "true: read the whole prompt before anything goes",
}
"""Options that every policy takes, unless it has one of that name itself."""


def parse(spec: str) -> Policy:
    """The policy that a SPEC names.

    Beside its own options every policy takes ``budget``, ``sinks``, ``recent`` and ``oneshot``: see `budget`,
    `protect` and `oneshot`. ``corm:profile=FILE`` is CORM with a window for each head, and
    ``corm:profile=smollm2-135m`` one that comes with the package: see `corm_jax.policies.profile`.

    >>> parse("corm:window=64,recent=32,group=mean")
    Corm(window=64, recent=32, multiple=1, threshold='position', group='mean', eager=False)
    >>> parse("tova:budget=0.25,sinks=4")
    Budget(policy=Protect(policy=TOVA(), sinks=4, recent=0), tokens=0, per_mille=250)

    Raises:
      CormError: for an unknown policy or option, or a value out of range.
    """
    name, _, rest = spec.strip().partition(":")
    profile, rest = _profile(name, rest)
    if name not in POLICIES:
        raise CormError(f"unknown policy {name!r} in {spec!r}: choose from {', '.join(POLICIES)}")
    fields = {} if profile else {field.name: field for field in dataclasses.fields(POLICIES[name])}
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in fields | COMBINATORS or not equals:
            known = ", ".join(f"{option}=..." for option in dict.fromkeys([*fields, *COMBINATORS]))
            what = f"{name} with a profile, which says the rest," if profile else name
            raise CormError(f"unknown option {item.strip()!r} in {spec!r}: {what} has {known}")
        if key in options:
            raise CormError(f"option {key!r} is given twice in {spec!r}")
        options[key] = text
    try:
        own = {key: _value(fields[key], text) for key, text in options.items() if key in fields}
        policy = Profile.load(profile).policy() if profile else POLICIES[name](**own)
        guards = {key: _whole(key, options[key]) for key in ("sinks", "recent") if key in options.keys() - fields}
        if guards:
            policy = protect(policy, **guards)
        if "budget" in options.keys() - fields:
            policy = budget(policy, _size(options["budget"]))
        if "oneshot" in options and _truth("oneshot", options["oneshot"]):
            policy = oneshot(policy)
    except CormError as error:
        raise CormError(f"{error} (in {spec!r})") from None
    return policy


def on_budget(spec: str, size: int) -> str:
    """A SPEC with a budget of ``size`` keys a head, unless it has one already or is ``full``.

    H2O gets half of it for recent keys, as in its paper, if nothing else is said.

    >>> on_budget("h2o", 512), on_budget("corm:window=64,recent=64", 512)
    ('h2o:recent=256,budget=512', 'corm:window=64,recent=64,budget=512')
    """
    name, _, rest = spec.partition(":")
    options, names = [item for item in rest.split(",") if item], _names(rest)
    if name == "full" or "budget" in names:
        return spec
    if name == "h2o" and "recent" not in names:
        options.append(f"recent={size // 2}")
    return f"{name}:{','.join([*options, f'budget={size}'])}"


def lacks_window(spec: str) -> bool:
    """Whether a SPEC is CORM without a window of its own, so that one can be searched that fits a budget.

    >>> lacks_window("corm:group=mean"), lacks_window("corm:window=64"), lacks_window("tova")
    (True, False, False)
    """
    name, _, rest = spec.partition(":")
    return name == "corm" and not {"window", "recent", "profile", *COMBINATORS} & _names(rest)


def keeps_everything(spec: str) -> bool:
    """Whether a SPEC only ranks keys and has no budget, so that nothing is evicted before the slots run out.

    >>> keeps_everything("tova:sinks=4"), keeps_everything("tova:budget=64"), keeps_everything("corm")
    (True, False, False)
    """
    name, _, rest = spec.strip().partition(":")
    return name in RANKING and "budget" not in _names(rest)


def profile_of(spec: str) -> Profile | None:
    """The profile that a SPEC names, if it names one."""
    name, _, rest = spec.strip().partition(":")
    profile, _ = _profile(name, rest)
    return Profile.load(profile) if profile else None


def _profile(name: str, rest: str) -> tuple[str, str]:
    """The profile among CORM's options, and the options without it."""
    items = [item for item in rest.split(",") if item]
    found = [item for item in items if name == "corm" and item.partition("=")[0].strip() == "profile"]
    if len(found) > 1 or (found and not found[0].partition("=")[2].strip()):
        raise CormError(f"{','.join(found)}: give one profile, a name or a file")
    return (found[0].partition("=")[2].strip() if found else ""), ",".join(x for x in items if x not in found)


def _names(options: str) -> set[str]:
    return {item.partition("=")[0].strip() for item in options.split(",") if item}


def keys_of(size: str, tokens: int) -> int:
    """How many keys of ``tokens`` a budget is: ``"512"``, or a share in (0, 1] such as ``"0.25"``, rounded down.

    Raises:
      CormError: for anything else.
    """
    number = _size(size)
    if isinstance(number, float) and 0 < number <= 1:
        return max(int(number * tokens), 1)
    if isinstance(number, float) or number < 1:
        raise CormError(f"a budget must be a whole number of keys from 1 up, or a share in (0, 1], not {size}")
    return number


def _value(field: dataclasses.Field, text: str) -> Any:
    if choices := field.metadata.get("choices"):
        if text in choices:
            return text
        raise CormError(f"{field.name} must be {' or '.join(choices)}, not {text!r}")
    if field.metadata.get("size"):
        return _size(text)
    if isinstance(field.default, bool):
        return _truth(field.name, text)
    return _whole(field.name, text) if isinstance(field.default, int) else _number(field.name, text)


def _truth(name: str, text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise CormError(f"{name} must be true or false, not {text!r}")


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CormError(f"{name} must be a whole number, not {text!r}") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CormError(f"{name} must be a number, not {text!r}") from None


def _size(text: str) -> int | float:
    return _number("budget", text) if "." in text else _whole("budget", text)


__all__ = [
    "COMBINATORS",
    "H2O",
    "POLICIES",
    "RANKING",
    "SELF_SIZED",
    "TOVA",
    "AdaKV",
    "AdaptiveCorm",
    "Budget",
    "Corm",
    "Full",
    "L2Norm",
    "Oneshot",
    "Protect",
    "PyramidKV",
    "Random",
    "Recorder",
    "Scissorhands",
    "SnapKV",
    "StreamingLLM",
    "budget",
    "choice",
    "keeps_everything",
    "keys_of",
    "lacks_window",
    "number",
    "on_budget",
    "oneshot",
    "parse",
    "policy",
    "profile_of",
    "protect",
    "recorded",
    "size",
    "static",
    "weights",
]
