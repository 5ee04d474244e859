"""The notation in which a command line names policies, the SPEC: ``name:option=value,...``.

The name is one of `corm_jax.policies.registry`, or ``module:Class`` of your own, whose module is then imported:

    tova:budget=512,sinks=4
    my_policies:Recent:budget=512,sinks=4
    my_policies:Recent(budget=512, sinks=4)         # the same; a shell needs quotes

A value is a literal of Python, and nothing is evaluated: a number, a list of numbers in brackets (one for each head),
``true`` or ``false``; any other text is taken as it stands.
"""

import ast
import dataclasses
import re
from typing import Any, NamedTuple

from corm_jax.core.options import integer, truth
from corm_jax.core.policy import Policy, check_policy
from corm_jax.errors import CormError
from corm_jax.policies.budget import budget
from corm_jax.policies.full import Full
from corm_jax.policies.oneshot import oneshot
from corm_jax.policies.profile import Profile
from corm_jax.policies.protect import protect
from corm_jax.policies.registry import POLICIES, class_of, evicts_by_itself, registered, sizes_itself

COMBINATORS = {
    "budget": "keys of a head that stay at most, as in 512, or a share of those seen, as in 0.25",
    "sinks": "first tokens whose keys are never evicted",
    "recent": "newest tokens whose keys are never evicted",
    "oneshot": "true: no key is evicted before the whole prompt has been read",
}
"""Options that every policy takes, unless it has one of that name itself."""


class Notation(NamedTuple):
    """A SPEC, taken apart. Its text is ``str(spec)``.

    Attributes:
      name: ``"tova"``, or ``"my_policies:Recent"``.
      options: their texts by name, in order.

    >>> spec = Notation.read("my_policies:Recent:weights=[1, 2],sinks=4")
    >>> spec.name, spec.options
    ('my_policies:Recent', {'weights': '[1, 2]', 'sinks': '4'})
    >>> str(spec.having(budget=64))
    'my_policies:Recent:weights=[1, 2],sinks=4,budget=64'
    """

    name: str
    options: dict[str, str]

    @classmethod
    def read(cls, text: str) -> "Notation":
        """A SPEC from its text. No module is imported, and whether there is such a policy is not asked.

        Raises:
          CormError: for what is not of this form.
        """
        name, _, rest = (part.strip() for part in text.strip().partition(":"))
        if name not in POLICIES and (found := re.match(r"([^\W\d]\w*)\s*(:|\(|$)", rest)) and name not in registered():
            name, rest = f"{name}:{found[1]}", rest[found.end() :].strip()
            if found[2] == "(":
                if not rest.endswith(")"):
                    raise CormError(f"{text!r} has no closing parenthesis at its end: write {name}(option=value,...)")
                rest = rest[:-1]
        options: dict[str, str] = {}
        for item in filter(None, _items(rest)):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise CormError(f"unknown option {item!r} in {text!r}: write each as option=value")
            if key in options:
                raise CormError(f"option {key!r} is given twice in {text!r}")
            options[key] = value
        return cls(name, options)

    def __str__(self) -> str:
        """``name:option=value,...``."""
        items = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}:{items}" if items else self.name

    def having(self, **options: Any) -> "Notation":
        """The same with further options.

        Raises:
          CormError: for one that it has already.
        """
        for name in options:
            if name in self.options:
                raise CormError(f"option {name!r} is given twice, in {str(self)!r} and beside it")
        return Notation(self.name, self.options | {name: str(value) for name, value in options.items()})

    @property
    def profile(self) -> str | None:
        """The name or the file of CORM's profile, if there is one."""
        return self.options.get("profile") if self.name == "corm" else None

    @property
    def ours(self) -> bool:
        """Whether no module of a user's has to be imported for it."""
        return ":" not in self.name


def parse(spec: str) -> Policy:
    """The policy that a SPEC names.

    Beside its own options every policy takes ``budget``, ``sinks``, ``recent`` and ``oneshot``: see `budget`,
    `protect` and `oneshot`. ``corm:profile=FILE`` is CORM with a window for each head, and
    ``corm:profile=smollm2-135m`` one that comes with the package: see `corm_jax.policies.profile`.

    ``module:Class`` names a policy of your own. Its module is imported, which runs its code, from wherever Python
    finds modules; the command lines also look into the current directory.

    >>> parse("corm:window=64,recent=32,group=mean")
    Corm(window=64, recent=32, multiple=1, threshold='position', group='mean', eager=False)
    >>> parse("tova:budget=0.25,sinks=4")
    Budget(policy=Protect(policy=TOVA(), sinks=4, recent=0), tokens=0, per_mille=250)
    >>> parse("corm_jax.policies.tova:TOVA:sinks=4")
    Protect(policy=TOVA(), sinks=4, recent=0)

    Raises:
      CormError: for an unknown policy or option, a value out of range, and what is no policy.
    """
    try:
        return _made(Notation.read(spec), spec)
    except CormError as error:
        inside = "" if repr(spec) in str(error) else f" (in {spec!r})"
        raise CormError(f"{error}{inside}") from error.__cause__


def _made(spec: Notation, text: str) -> Policy:
    kind = class_of(spec.name)
    if spec.profile == "":
        raise CormError("profile=: give one profile, a name or a file")
    fields = {} if spec.profile else {field.name: field for field in dataclasses.fields(kind) if field.init}
    texts = {key: value for key, value in spec.options.items() if not (spec.profile and key == "profile")}
    for key, value in texts.items():
        if key not in fields | COMBINATORS:
            known = ", ".join(f"{option}=..." for option in dict.fromkeys([*fields, *COMBINATORS]))
            what = f"{spec.name} with a profile, which says the rest," if spec.profile else spec.name
            raise CormError(f"unknown option '{key}={value}' in {text!r}: {what} has {known}")
    values = {key: _literal(value) for key, value in texts.items()}
    own = {key: texts[key] if fields[key].metadata.get("choices") else values[key] for key in texts if key in fields}
    needed = [key for key, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [key for key in needed if key not in own]:
        raise CormError(f"{spec.name} needs {', '.join(f'{key}=...' for key in missing)}")
    policy = Profile.load(spec.profile).policy() if spec.profile else kind(**own)
    check_policy(policy)
    more = {key: value for key, value in values.items() if key not in fields}
    if guards := {key: more[key] for key in ("sinks", "recent") if key in more}:
        policy = protect(policy, **guards)
    if "budget" in more:
        policy = budget(policy, more["budget"])
    return oneshot(policy) if "oneshot" in more and truth("oneshot", more["oneshot"]) else policy


def on_budget(spec: str, size: int) -> str:
    """A SPEC with a budget of ``size`` keys a head, unless it has one already or is ``full``.

    H2O gets half of it for recent keys, as in its paper, if nothing else is said.

    >>> on_budget("h2o", 512), on_budget("corm:window=64,recent=64", 512)
    ('h2o:recent=256,budget=512', 'corm:window=64,recent=64,budget=512')
    """
    read = Notation.read(spec)
    if read.name == "full" or "budget" in read.options:
        return spec
    if read.name == "h2o" and "recent" not in read.options:
        read = read.having(recent=size // 2)
    return str(read.having(budget=size))


def lacks_window(spec: str) -> bool:
    """Whether a SPEC is CORM without a window of its own, so that one can be searched that fits a budget.

    >>> lacks_window("corm:group=mean"), lacks_window("corm:window=64"), lacks_window("tova")
    (True, False, False)
    """
    read = Notation.read(spec)
    return read.name == "corm" and not {"window", "recent", "profile", *COMBINATORS} & read.options.keys()


def keeps_everything(spec: str) -> bool:
    """Whether a SPEC only ranks keys and has no budget, so that nothing is evicted before the slots run out.

    >>> keeps_everything("tova:sinks=4"), keeps_everything("tova:budget=64"), keeps_everything("corm")
    (True, False, False)
    """
    read = Notation.read(spec)
    kind = class_of(read.name)
    return not (kind is Full or evicts_by_itself(kind) or "budget" in read.options)


def held_by(spec: str) -> str:
    """What a budget is to a SPEC: ``"none"`` to the full cache, a ``"cap"`` to what sizes itself, else ``"fixed"``.

    >>> held_by("full"), held_by("corm:window=64"), held_by("tova"), held_by("scissorhands")
    ('none', 'cap', 'fixed', 'fixed')
    """
    kind = class_of(Notation.read(spec).name)
    return "none" if kind is Full else "cap" if sizes_itself(kind) else "fixed"


def default_spec(tokens: int) -> str:
    """The SPEC of CORM for a text of this many tokens: w = r = 256, or an eighth of a shorter text.

    >>> default_spec(4096), default_spec(512)
    ('corm:window=256,recent=256', 'corm:window=64,recent=64')
    """
    size = max(1, min(256, tokens // 8))
    return f"corm:window={size},recent={size}"


def profile_of(spec: str) -> Profile | None:
    """The profile that a SPEC names, if it names one."""
    profile = Notation.read(spec).profile
    return Profile.load(profile) if profile else None


def keys_of(size: str, tokens: int) -> int:
    """How many keys of ``tokens`` a budget is: ``"512"``, or a share in (0, 1] such as ``"0.25"``, rounded down.

    Raises:
      CormError: for anything else.
    """
    number = _literal(size)
    if isinstance(number, float) and 0 < number <= 1:
        return max(int(number * tokens), 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise CormError(f"a budget must be a whole number of keys from 1 up, or a share in (0, 1], not {size}")
    return integer("a budget", number)


def _items(text: str) -> list[str]:
    """The options, which commas separate; those in brackets do not."""
    ends, depth = [-1], 0
    for at, sign in enumerate(text):
        depth += (sign in "[(") - (sign in "])")
        ends += [at] if sign == "," and depth <= 0 else []
    return [text[begin + 1 : end].strip() for begin, end in zip(ends, [*ends[1:], len(text)], strict=True)]


def _literal(text: str) -> Any:
    """What a text says as a literal of Python; itself, if it is none."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
