"""Whether an object is built as a policy has to be: the first check of the conformance suite.

The other checks rely on it, so each mistake is named here, in one line with the expectation.

>>> from corm_jax import Corm
>>> check_construction(Corm)
Traceback (most recent call last):
    ...
simulator.invariants.InvariantError: construction: Corm is a class: give an object of it, as in Corm(...)
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core import cache as cache_lib
from corm_jax.core.arrays import iota
from corm_jax.core.attention import attend
from corm_jax.core.options import numbers_in
from corm_jax.core.policy import EVERYTHING, Policy, Traits
from corm_jax.core.types import CacheSpec, OfHead, by_slot
from corm_jax.policies import Full
from simulator.invariants import InvariantError
from simulator.strategies import CHUNK, GROUP, KV_HEADS, TOKENS

MEMBERS = {
    "init": "init(self, spec), the state of empty slots: arrays that end in the axes spec.slots, or OfHead(by head)",
    "observe": "observe(self, state, observation, slots), the next state, of the same shapes and dtypes",
    "retain": "retain(self, state, slots), a bool for each slot: whether its key stays",
    "score": "score(self, state, slots), a number for each slot: the key with the lowest is evicted first",
}
"""The methods of every policy: the arguments of each, and what it returns."""

POLICY = (
    "a policy, such as corm_jax.Corm(window=4, recent=2) or an object of a class that inherits from corm_jax.Policy"
)

SCENES = (
    ("in a rectangle", CacheSpec(KV_HEADS, 16, TOKENS), CHUNK),
    ("in a pool", CacheSpec(KV_HEADS, 16, TOKENS, stores=1), 1),
    ("in a chunk on a pool", CacheSpec(KV_HEADS, 16, TOKENS, stores=1), CHUNK),
)
"""The caches in which the functions of a policy are traced: in words, the shape, and how many queries at once."""

MOST = 2**16
"""The most keys of a head that a policy may protect here: the caches of the suite hold them all."""

DECORATE = "decorate the class with corm_jax.policy, which makes it a frozen dataclass and a pytree"

_sound: set[Any] = set()


def check_construction(policy: Any) -> None:
    """Checks that a policy, and each that it wraps, is built as `corm_jax.core.policy.Policy` demands.

    Raises:
      InvariantError: named ``construction``, for the first thing that is wrong.
    """
    if isinstance(policy, type):
        _refuse(policy.__name__, f"is a class: give an object of it, as in {policy.__name__}(...)")
    if isinstance(policy, str):
        _refuse(repr(policy), f"is text: give the policy itself, as in corm_jax.parse({policy!r})")
    if isinstance(policy, list | tuple) and not hasattr(policy, "_fields"):
        _refuse(f"a {type(policy).__name__}", "is no policy: give one at a time")
    name: str = type(policy).__name__
    _check_members(name, policy)
    _check_dataclass(name, policy)
    if "policy" in _names(policy):  # a wrapper
        check_construction(_get(name, policy, "policy"))
    key = _check_pytree(name, policy)
    _check_traits(name, policy)
    if key in _sound:
        return
    for scene in SCENES:
        _Scene(name, policy, *scene).check()
    _sound.add(key)


def _refuse(name: str, what: str) -> NoReturn:
    raise InvariantError("construction", f"{name} {what}")


def _check_members(name: str, policy: Any) -> None:
    if not isinstance(policy, Policy):
        _refuse(name, f"is no policy: expected {POLICY}")
    if type(policy).score is Policy.score:
        _refuse(name, f"has no `score`: expected {MEMBERS['score']}")
    for member in MEMBERS:
        if not callable(_get(name, policy, member)):
            _refuse(name, f"has a `{member}` that is no function: expected {MEMBERS[member]}")


def _check_dataclass(name: str, policy: Any) -> None:
    if not dataclasses.is_dataclass(policy):
        _refuse(name, f"is no dataclass: {DECORATE}")
    if jax.tree.structure(policy) == jax.tree.structure(0):
        _refuse(name, f"is no pytree: {DECORATE}, and each class that inherits from it too")


def _check_pytree(name: str, policy: Any) -> Any:
    """Checks that JAX can use the policy as a pytree. Returns a key: equal keys mean equal traced programs."""
    numbers = numbers_in(policy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(policy):
        field = f"{name}{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float) or not _numeric(leaf):
            _refuse(
                field,
                f"is {leaf!r}, no number: make it static, as corm_jax.core.options.choice does, or a field with "
                'metadata={"static": True}',
            )
        if jax.tree_util.keystr(path).lstrip(".") in numbers and np.shape(leaf) not in ((), (KV_HEADS,)):
            _refuse(
                field,
                f"has the shape {np.shape(leaf)}: give a number, or one for each of the {KV_HEADS} key-value heads of "
                "the layer on which it is tried",
            )
    leaves, structure = jax.tree.flatten(policy)
    try:
        again = jax.tree.unflatten(structure, [object() for _ in leaves])  # JAX does that as well
        same = type(again) is type(policy) and jax.tree.structure(again) == structure
        _ = (
            hash(structure),
            structure == jax.tree.structure(copy.deepcopy(policy)),
        )  # as jax.jit does
    except Exception as error:
        _refuse(name, f"is a pytree that JAX cannot flatten and unflatten ({_short(error)}): {DECORATE}")
    if not same:
        _refuse(name, f"changes when JAX flattens and unflattens it: {DECORATE}")
    names = _names(policy)
    children = jax.tree_util.tree_leaves_with_path(policy, is_leaf=lambda x: x is not policy)
    traced = [path[0].name for path, _ in children if isinstance(path[0], jax.tree_util.GetAttrKey)]
    twin = dataclasses.make_dataclass("Twin", names, frozen=True)
    jax.tree_util.register_dataclass(twin, data_fields=traced, meta_fields=[x for x in names if x not in traced])
    if structure == jax.tree.structure(twin(*(getattr(policy, x) for x in names))):
        _refuse(name, f"may be taken for another class of the same fields by jax.jit: {DECORATE}")
    return type(policy), structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _check_traits(name: str, policy: Any) -> None:
    """Checks the declarations of the policy, and its `for_layer`."""
    traits = _get(name, policy, "traits")
    if not isinstance(traits, Traits):
        _refuse(name, f"has `traits` of {traits!r}: expected a @property that gives corm_jax.Traits(...)")
    for trait, least, meaning in (
        ("protected", 0, "how many keys of a head are never evicted"),
        ("recent", 0, "how many of the newest keys of a head are never evicted"),
        ("most", 1, "how many keys of a head are live at most"),
    ):
        value: Any = getattr(traits, trait)
        if value is None and trait == "most":
            continue
        numbers = np.asarray(value if isinstance(value, jax.Array | np.ndarray | np.generic | int) else "no number")
        if numbers.dtype.kind not in "iu" or numbers.shape not in ((), (KV_HEADS,)) or numbers.min() < least:
            _refuse(
                name, f"has a `{trait}` of {value!r}: expected {meaning}, a whole number from {least} up or one a head"
            )
    if np.max(traits.protected) > MOST:
        _refuse(name, f"protects {np.max(traits.protected):,} keys of a head: give numbers below {TOKENS} to try it")
    needs = traits.needs
    if not isinstance(needs, tuple | list | set | frozenset) or any(need not in EVERYTHING for need in needs):
        some = ", ".join(map(repr, EVERYTHING))
        _refuse(name, f"has a `needs` of {needs!r}: expected a tuple of what it observes beside positions, of {some}")
    waits = traits.whole_prompt
    if not isinstance(waits, bool | np.bool_):
        _refuse(name, f"has a `whole_prompt` of {waits!r}: expected True or False")
    positions = traits.positions
    if not isinstance(positions, str) or positions not in ("original", "cache"):
        _refuse(name, f"has `positions` of {positions!r}: expected 'original' or 'cache'")
    if positions == "cache":
        _refuse(name, "counts positions within the cache, which needs a rotation: try it with positions='original'")
    expected = "for_layer(self, layer, layers), the policy of one layer"
    try:
        found = policy.for_layer(0, 1)
    except Exception as error:
        _refuse(name, f"has a `for_layer` that raises {_short(error)}: expected {expected}")
    if not isinstance(found, Policy):
        _refuse(name, f"has a `for_layer` that gives {found!r}: expected {expected}")


class _Scene:
    """The functions of a policy in one kind of cache."""

    def __init__(self, name: str, policy: Any, where: str, spec: CacheSpec, tokens: int):
        self.name, self.policy, self.where, self.spec, self.tokens = name, policy, where, spec, tokens

    def check(self) -> None:
        slots, observation = jax.eval_shape(self._slots)
        state, shape = self._state(), slots.position.shape
        state = by_slot(lambda x: jax.ShapeDtypeStruct((*x.shape[:-2], *shape), x.dtype), state)
        after = self._traced("observe", state, observation, slots)
        if _avals(after) != _avals(state):
            self._refuse("observe", f"turns a state of {_avals(state)} into {_avals(after)}")
        for member, kinds in (("retain", (np.bool_,)), ("score", (np.integer, np.floating))):
            value = self._traced(member, state, slots)
            good = isinstance(value, jax.ShapeDtypeStruct) and value.shape == shape
            if not good or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
                self._refuse(member, f"gives {_avals(value)} for slots {list(shape)}")

    def _slots(self):
        """The slots that a policy gets, and its observation of them."""
        cache = cache_lib.make_cache(Full(), self.spec)
        slots, k = cache_lib.slots(cache), cache.k
        if self.tokens > 1:
            opened = slots.layout.opened(slots.position)
            slots = dataclasses.replace(slots, position=opened.take(slots.position), layout=opened.layout)
            k = opened.take(k, rows=True)
        q = jnp.zeros((self.tokens, KV_HEADS, GROUP, self.spec.head_dim), jnp.float32)
        visible = jnp.broadcast_to(slots.live, (self.tokens, *slots.position.shape))
        return slots, attend(q, k, k, visible, iota(self.tokens) + 1, slots.layout)[1]

    def _state(self) -> Any:
        state, slots = self._call("init", lambda: self.policy.init(self.spec)), self.spec.slots
        parts = self._call("init", lambda: jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, OfHead)))
        for part in parts:
            leaf, axes = (part.value, (self.spec.kv_heads,)) if isinstance(part, OfHead) else (part, slots)
            if not isinstance(leaf, jax.Array):
                self._refuse("init", f"gives a {type(leaf).__module__}.{type(leaf).__qualname__}")
            if leaf.shape[max(leaf.ndim - len(axes), 0) :] != axes:
                what = f"slots {list(slots)}" if axes is slots else f"{self.spec.kv_heads} heads"
                self._refuse("init", f"gives {_avals(leaf)} for {what}")
            if leaf.weak_type:
                self._refuse("init", f"gives {_avals(leaf)} of a weak type, which other steps change: give its dtype")
        traced = self._call("init", lambda: jax.eval_shape(lambda policy: policy.init(self.spec), self.policy))
        if _avals(traced) != _avals(state):
            self._refuse("init", f"gives {_avals(state)}, but {_avals(traced)} while JAX traces it")
        return state

    def _traced(self, member: str, *arguments: Any) -> Any:
        return self._call(
            member, lambda: jax.eval_shape(lambda policy, *x: getattr(policy, member)(*x), self.policy, *arguments)
        )

    def _call(self, member: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            hint = ""
            if isinstance(error, jax.errors.JAXTypeError):
                hint = (
                    " (values are unknown while JAX traces: use jax.numpy, jnp.where for if, or make an option static)"
                )
            self._refuse(member, f"raises {_short(error)}{hint}")

    def _refuse(self, member: str, what: str) -> NoReturn:
        _refuse(self.name, f"has a `{member}` that {what}, {self.where}: expected {MEMBERS[member]}")


def _names(policy: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(policy)]


def _get(name: str, policy: Any, member: str) -> Any:
    try:
        return getattr(policy, member)
    except Exception as error:
        expected = MEMBERS.get(member, "what can be read at any time")
        _refuse(name, f"has a `{member}` that raises {_short(error)}: expected {expected}")


def _numeric(leaf: Any) -> bool:
    dtype = np.asarray(leaf).dtype
    return any(jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer, np.floating))


class _Aval(NamedTuple):
    """An array, as in ``float32[2, 16]``."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _avals(tree: Any) -> str:
    """The shapes and dtypes of a pytree, in its structure."""
    leaves, structure = jax.tree.flatten(tree)
    return repr(jax.tree.unflatten(structure, [_Aval(f"{leaf.dtype}{list(leaf.shape)}") for leaf in leaves]))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' * (len(text) > 160)}"
