"""Which class a policy's name means: one of ours, of an installed package, or ``module:Class`` of your own.

A package registers a policy in its ``pyproject.toml``, by the name that the user types:

    [project.entry-points."corm_jax.policies"]
    fading = "my_package.policies:Fading"
"""

import dataclasses
import importlib
import traceback
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from corm_jax.core.policy import Policy
from corm_jax.errors import CormError
from corm_jax.policies.adakv import AdaKV
from corm_jax.policies.adaptive_corm import AdaptiveCorm
from corm_jax.policies.corm import Corm
from corm_jax.policies.full import Full
from corm_jax.policies.h2o import H2O
from corm_jax.policies.l2norm import L2Norm
from corm_jax.policies.pyramidkv import PyramidKV
from corm_jax.policies.random import Random
from corm_jax.policies.scissorhands import Scissorhands
from corm_jax.policies.snapkv import SnapKV
from corm_jax.policies.streaming_llm import StreamingLLM
from corm_jax.policies.tova import TOVA
from corm_jax.policies.window import Window

POLICIES: dict[str, type[Any]] = {
    "full": Full,
    "corm": Corm,
    "adaptive_corm": AdaptiveCorm,
    "streaming_llm": StreamingLLM,
    "window": Window,
    "h2o": H2O,
    "scissorhands": Scissorhands,
    "tova": TOVA,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "l2norm": L2Norm,
    "random": Random,
}
"""The policies of this package."""

GROUP = "corm_jax.policies"
"""The group of entry points that are policies."""

METHODS = ("init", "observe", "retain", "score")


@cache
def registered() -> dict[str, list[EntryPoint]]:
    """The policies of installed packages by name, none of them imported. A name of ours stays ours."""
    found: dict[str, list[EntryPoint]] = {}
    for plugin in sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name):
        if plugin.name not in POLICIES:
            found.setdefault(plugin.name, []).append(plugin)
    return found


def class_of(name: str) -> type[Any]:
    """The class of a policy. What is not ours is imported: that runs the code of its module.

    Args:
      name: of a policy of this package or one that is installed, or ``module:Class``.

    Raises:
      CormError: for an unknown name, a module that is missing or raises an error, or what is no policy there.

    >>> class_of("tova").__name__, class_of("corm_jax.policies.tova:TOVA").__name__
    ('TOVA', 'TOVA')
    """
    if name in POLICIES:
        return POLICIES[name]
    module, colon, attribute = name.partition(":")
    if colon:
        return _checked(name, module, attribute, lambda: importlib.import_module(module))
    plugins = registered().get(name)
    if not plugins:
        known = ", ".join([*POLICIES, *registered()])
        raise CormError(f"unknown policy {name!r}: choose from {known}, or name a class of yours as module:Class")
    if len(plugins) > 1:
        places = " and ".join(plugin.value for plugin in plugins)
        raise CormError(f"two policies are called {name!r}, {places}: uninstall the package of one of them")
    plugin = plugins[0]
    return _checked(name, plugin.module, plugin.attr, lambda: importlib.import_module(plugin.module))


def evicts_by_itself(kind: type[Any]) -> bool:
    """Whether policies of a class evict though there are free slots. The others only rank keys, or keep all."""
    return kind.retain is not Policy.retain


def sizes_itself(kind: type[Any]) -> bool:
    """Whether they decide by themselves how many keys stay: they evict by themselves, and on no budget of theirs."""
    return evicts_by_itself(kind) and "budget" not in {field.name for field in dataclasses.fields(kind)}


def _checked(name: str, module: str, attribute: str, load: Callable[[], Any]) -> type[Any]:
    """The class that is called ``attribute`` in a module, if it is a policy's."""
    found = _imported(name, module, load)
    place = f"{module} ({getattr(found, '__file__', None) or 'built in'})"
    kind = getattr(found, attribute, None)
    if kind is None:
        there = [key for key, one in vars(found).items() if isinstance(one, type) and issubclass(one, Policy)]
        others = f"its policies are {', '.join(there)}" if there else "no class in it is a policy"
        raise CormError(f"{place} has no {attribute}: {others}")
    if not isinstance(kind, type):
        raise CormError(
            f"{attribute} in {place} is no class, but a {type(kind).__name__}: name the class of the policy"
        )
    if not issubclass(kind, Policy):
        lacks = [method for method in METHODS if not hasattr(kind, method)]
        missing = f" and lacks {', '.join(lacks)}" if lacks else ""
        raise CormError(
            f"{attribute} in {place} is not a policy: it does not inherit from corm_jax.Policy{missing}, see "
            "docs/policies.md"
        )
    if "__dataclass_fields__" not in vars(kind):
        raise CormError(f"{attribute} in {place} is not a policy yet: decorate the class with corm_jax.policy")
    if kind.score is Policy.score:
        raise CormError(f"{attribute} in {place} has no `score`: say how much each key is worth, see corm_jax.Policy")
    return kind


def _imported(name: str, module: str, load: Callable[[], Any]) -> Any:
    if not all(part.isidentifier() for part in module.split(".")):
        raise CormError(f"{name!r} names no policy: write name:option=value,... or module:Class:option=value,...")
    try:
        return load()
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise CormError(
                f"there is no module {error.name!r} for the policy {name!r}: install it, or run the command in the "
                "directory that holds it"
            ) from None
        raise CormError(f"{module} cannot be imported: it needs {error.name}, which is not installed") from error
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise CormError(f"{module} cannot be imported: {what} ({last.filename}, line {last.lineno})") from error
