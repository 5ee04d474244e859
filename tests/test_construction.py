"""Policies that are built wrongly, each named in one line with what was expected and the way out."""

from dataclasses import dataclass, field
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corm_jax import H2O, POLICIES, TOVA, Corm, Full, Policy, StreamingLLM, Traits, parse, policy, protect
from simulator.construction import MEMBERS, check_construction
from simulator.invariants import InvariantError
from simulator.testing import check_policy, parametrize_checks


class Sound(Policy):
    """Nothing is wrong with it, but for what those that inherit from it change."""

    def init(self, spec):
        return jnp.zeros(spec.slots, jnp.float32)

    def observe(self, state, observation, slots):
        return state + observation.probability.mean(0).sum(0)

    def retain(self, state, slots):
        return slots.live & (slots.position >= slots.seen - 4)

    def score(self, state, slots):
        return slots.position


def built(**members):
    """An object of a class with these members in place of the sound ones."""
    return policy(type("Built", (Sound,), members))()


class Undecorated(Sound):
    pass


class Bare:
    pass


@policy
class Child(Corm):
    pass


class UndecoratedChild(Corm):
    def score(self, state, slots):
        return state


@dataclass(frozen=True)
class Plain(Sound):
    size: int = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Registered(Sound):
    size: int = 3


@flax.struct.dataclass
class Flax(Sound):
    size: int = flax.struct.field(default=3, pytree_node=False)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Validating(Sound):
    size: int = 3

    def __post_init__(self):
        if not isinstance(self.size, int):
            raise TypeError(f"size must be an int, not {type(self.size).__name__}")

    def tree_flatten(self):
        return [self.size], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@policy
class Text(Sound):
    mode: str = "fast"


@policy
class Ambiguous(Sound):
    sizes: np.ndarray = field(default_factory=lambda: np.arange(2), metadata={"static": True})


@policy
class Sized(Sound):
    size: int = 3

    def init(self, spec):
        return jnp.zeros((self.size, *spec.slots))


@policy
class Decides(Sound):
    size: int = 3

    def retain(self, state, slots):
        return slots.live if slots.seen > self.size else slots.live & (slots.position > 0)


@policy
class Around(Sound):
    """A wrapper that looks at nothing itself."""

    policy: Any


@property
def fails(self):
    raise KeyError("size")


@property
def fails_as_if_missing(self):
    return self.nothing_of_that_name


def zeros(*shape, dtype=jnp.float32):
    return lambda self, *arguments: jnp.zeros(shape, dtype)


WRONG = {
    "a class": (Corm, "Corm is a class: give an object of it, as in Corm(...)"),
    "text": ("corm", "'corm' is text: give the policy itself, as in corm_jax.parse('corm')"),
    "a list": ([Full()], "a list is no policy: give one at a time"),
    "nothing": (None, "NoneType is no policy: expected a policy, such as"),
    "a function": (zeros, "function is no policy"),
    "an object of another class": (Bare(), "Bare is no policy"),
    "no traits": (built(traits=None), "Built has `traits` of None: expected a @property that gives corm_jax.Traits(.."),
    "no score": (built(score=Policy.score), "Built has no `score`: expected score(self, state, slots), a number for e"),
    "score is a number": (built(score=3), "has a `score` that is no function: expected score(self, state, slots)"),
    "no dataclass": (Undecorated(), "Undecorated is no dataclass: decorate the class with corm_jax.policy"),
    "a plain dataclass": (Plain(), "Plain is no pytree: decorate the class with corm_jax.policy"),
    "a child that is not decorated": (
        UndecoratedChild(), "UndecoratedChild is no pytree: decorate the class with corm_jax.policy, which makes it a "
        "frozen dataclass and a pytree, and each class that inherits from it too",
    ),
    "registered by JAX": (Registered(jnp.int32(3)), "Registered may be taken for another class of the same fields"),
    "registered by flax": (Flax(), "Flax may be taken for another class of the same fields"),
    "a pytree that validates": (Validating(), "Validating is a pytree that JAX cannot flatten and unflatten (Ty"),
    "text that is not static": (Text(), "Text.mode is 'fast', no number: make it static, as corm_jax.core.options"),
    "an array that is static": (Ambiguous(), "Ambiguous is a pytree that JAX cannot flatten and unflatten (V"),
    "numbers for three heads": (Corm(window=np.array([3, 4, 5])), "Corm.window has the shape (3,): give a number, or "),
    "one without decoration inside another": (Around(policy=Plain()), "Plain is no pytree"),
    "a class inside another": (Around(policy=Corm), "Corm is a class: give an object"),
    "nothing inside another": (Around(policy=None), "NoneType is no policy"),
    "traits are a method": (built(traits=Sound.init), "has `traits` of <bound method"),
    "traits fail": (built(traits=fails), "has a `traits` that raises KeyError: 'size': expected"),
    "traits fail as if missing": (built(traits=fails_as_if_missing), "has a `traits` that raises AttributeE"),
    "protected is negative": (built(traits=Traits(protected=-1)), "has a `protected` of -1: expected how many keys of"),
    "protected is a share": (built(traits=Traits(protected=0.5)), "has a `protected` of 0.5"),
    "protected for three heads": (built(traits=Traits(protected=np.array([1, 2, 3]))), "has a `protected` of array([1"),
    "protected beyond all histories": (built(traits=Traits(protected=2**40)), "protects 1,099,511,627,776 keys of a h"),
    "recent is a share": (built(traits=Traits(recent=0.5)), "has a `recent` of 0.5: expected how many of the newest k"),
    "most is zero": (built(traits=Traits(most=0)), "has a `most` of 0: expected how many keys of a head are live at m"),
    "needs is text": (built(traits=Traits(needs="attention")), "has a `needs` of 'attention': expected a tuple of wha"),
    "needs what nobody has": (built(traits=Traits(needs=("attention", "entropy"))), "has a `needs` of ('attention', '"),
    "whole_prompt is text": (built(traits=Traits(whole_prompt="yes")), "has a `whole_prompt` of 'yes': expected True"),
    "positions of another kind": (built(traits=Traits(positions="rope")), "Built has `positions` of 'rope': expected"),
    "positions in the cache": (StreamingLLM(positions="cache"), "StreamingLLM counts positions within the cache"),
    "for_layer is a number": (built(for_layer=3), "has a `for_layer` that raises TypeError: 'int' obje"),
    "for_layer gives a number": (built(for_layer=lambda self, *layer: 3), "has a `for_layer` that gives 3: expected"),
    "for_layer gives a class": (built(for_layer=lambda self, *layer: Corm), "has a `for_layer` that gives <class"),
    "init without a spec": (built(init=lambda self: ()), "has a `init` that raises TypeError: "),
    "a state of NumPy": (
        built(init=lambda self, spec: np.zeros(spec.slots, np.float32)),
        "has a `init` that gives a numpy.ndarray, in a rectangle: expected init(self, spec), the state of empty slots",
    ),
    "a state of Python": (built(init=lambda self, spec: 0.0), "has a `init` that gives a builtins.float"),
    "a state for each head": (
        built(init=zeros(2)), "has a `init` that gives float32[2] for slots [2, 16], in a rectangle: expected init"
    ),
    "a state in the rectangle's shape": (
        built(init=lambda self, spec: jnp.zeros((spec.kv_heads, spec.capacity))),
        "has a `init` that gives float32[2, 16] for slots [1, 32], in a pool: expected init(self, spec)",
    ),
    "a state with slots in front": (
        built(init=lambda self, spec: jnp.zeros((*spec.slots, 3))), "gives float32[2, 16, 3] for slots [2, 16]"
    ),
    "a state of weak type": (
        built(init=lambda self, spec: jnp.full(spec.slots, 0.0)), "of a weak type, which other steps change: give its d"
    ),
    "a state whose shape is traced": (Sized(), "Sized has a `init` that raises TypeError: Shapes must be 1D sequences"),
    "observe returns nothing": (
        built(observe=lambda self, state, observation, slots: None),
        "has a `observe` that turns a state of float32[2, 16] into None, in a rectangle: expected observe(self",
    ),
    "observe changes the dtype": (
        built(observe=lambda self, state, observation, slots: state.astype(jnp.float16)), "into float16[2, 16], in a re"
    ),
    "observe changes a name": (
        built(
            init=lambda self, spec: {"a": jnp.zeros(spec.slots)},
            observe=lambda self, state, observation, slots: {"b": state["a"]},
        ),
        "a state of {'a': float32[2, 16]} into {'b': float32[2, 16]}",
    ),
    "observe sums over the slots": (
        built(observe=lambda self, state, observation, slots: state.sum(-1)), "into float32[2], in a rectangle"
    ),
    "observe with NumPy": (
        built(observe=lambda self, state, observation, slots: np.maximum(np.asarray(state), 0)),
        "has a `observe` that raises TracerArrayConversionError: ",
    ),
    "observe gives a function": (built(observe=zeros), "has a `observe` that raises TypeError: function"),
    "retain gives numbers": (
        built(retain=lambda self, state, slots: slots.position), "has a `retain` that gives int32[2, 16] for slots [2, "
    ),
    "retain gives True": (built(retain=lambda self, state, slots: True), "has a `retain` that gives bool[] for slots "),
    "retain gives nothing": (built(retain=lambda self, state, slots: None), "has a `retain` that gives None for slots"),
    "retain gives two": (
        built(retain=lambda self, state, slots: (slots.live, slots.live)), "gives (bool[2, 16], bool[2, 16]) for slots"
    ),
    "retain by head": (built(retain=lambda self, state, slots: slots.live.any(-1)), "has a `retain` that gives bool[2"),
    "retain asks if": (
        Decides(), "has a `retain` that raises TracerBoolConversionError: Attempted boolean conversion of traced array"
    ),
    "retain lacks an argument": (built(retain=lambda self, state: state > 0), "has a `retain` that raises TypeError: "),
    "score gives verdicts": (built(score=lambda self, state, slots: slots.live), "has a `score` that gives bool[2, 16"),
    "score gives one number": (built(score=lambda self, state, slots: 0), "has a `score` that gives int32[] for sl"),
    "score gives text": (built(score=lambda self, state, slots: "low"), "has a `score` that raises TypeError: "),
    "score is complex": (built(score=lambda self, state, slots: state + 0j), "has a `score` that "),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_constructions_are_named(name):
    wrong, message = WRONG[name]
    with pytest.raises(InvariantError) as caught:
        check_policy(wrong)
    assert str(caught.value).startswith("construction: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.invariant == "construction"


def test_from_every_door():
    """The policy is refused by every function that runs checks, for any check, and in a strategy too."""
    for wrong in (UndecoratedChild(), st.just(UndecoratedChild())):
        with pytest.raises(InvariantError, match="^construction: UndecoratedChild is no pytree"):
            check_policy(wrong, only="histories")
        for parameter in parametrize_checks(Corm, wrong).args[1]:
            with pytest.raises(InvariantError, match="^construction: (UndecoratedChild is no pytree|Corm is a class)"):
                parameter.values[0]()


@pytest.mark.parametrize("spec", [*POLICIES, "tova:budget=0.25,sinks=4", "corm:recent=4,budget=9,sinks=1,oneshot=true"])
def test_ours_are_built_well(spec):
    check_construction(parse(spec))


def test_what_is_allowed():
    """What is not as ours are, and no mistake either."""
    check_construction(Child())
    check_construction(Corm(window=jnp.array([3, 4]), recent=np.int64(2)))
    check_construction(protect(TOVA(), sinks=np.array([0, 4])))
    check_construction(built(traits=Traits(protected=np.array([1, 2]), needs=["keys"], most=None)))
    check_construction(built(init=lambda self, spec: (), observe=lambda self, state, observation, slots: state))
    check_construction(built(score=lambda self, state, slots: state.astype(jnp.bfloat16)))
    check_construction(built(retain=lambda self, state, slots: np.ones(slots.position.shape, bool)))


REPLACEMENTS = {
    "is missing": None,
    "is a number": 3,
    "is text": "text",
    "is an array": np.zeros(3),
    "is a class": Corm,
    "gives nothing": lambda self, *arguments: None,
    "gives a number": lambda self, *arguments: 1.5,
    "gives text": lambda self, *arguments: "text",
    "gives its last argument": lambda self, *arguments: arguments[-1],
    "gives its first argument": lambda self, *arguments: arguments[0],
    "gives itself": lambda self, *arguments: self,
    "gives a set": lambda self, *arguments: {1},
    "gives three numbers": lambda self, *arguments: jnp.zeros(3),
    "gives NaN": lambda self, *arguments: jnp.nan,
    "gives NumPy's": lambda self, *arguments: np.zeros((2, 16)),
    "raises": lambda self, *arguments: {}["key"],
    "raises as if it were hypothesis": lambda self, *arguments: (_ for _ in ()).throw(StopIteration),
    "takes nothing": lambda: None,
    "loops": lambda self, *arguments: self.loops,
    "is a generator": lambda self, *arguments: (yield 1),
}
TRAITS = ("protected", "recent", "most", "needs", "whole_prompt", "positions")


def verdict(one):
    """The error message about a policy; None if it is accepted."""
    try:
        check_construction(one)
    except InvariantError as error:
        return error
    return None


@settings(max_examples=80)
@given(
    member=st.sampled_from([*MEMBERS, *TRAITS, "traits", "for_layer"]),
    how=st.sampled_from([*REPLACEMENTS]),
    wrapped=st.booleans(),
)
def test_any_wrong_member_is_named(member, how, wrapped):
    """Nothing but a named error comes out, whatever stands in a member's place."""
    wrong = REPLACEMENTS[how]
    one = built(traits=Traits(**{member: wrong})) if member in TRAITS else built(**{member: wrong})
    error = verdict(Around(policy=one) if wrapped else one)
    if error is None:
        assert how in HARMLESS.get(member, set())
    else:
        assert error.invariant == "construction"
        assert "Built has" in str(error) or "Built counts" in str(error)
        assert "\n" not in str(error)


HARMLESS = {
    "protected": {"is a number"},
    "observe": {"gives its first argument"},
    "recent": {"is a number"},
    "most": {"is missing", "is a number"},
    "for_layer": {"gives itself"},
}
"""Changes that are not a mistake."""


def test_mistakes_that_show_later_bear_the_name_of_a_check():
    """What only a run can tell is an `InvariantError` all the same."""

    def fails_when_it_runs(self, state, slots):
        if not isinstance(slots.position, jax.core.Tracer):
            raise KeyError("only without jit")
        return slots.position

    late = built(score=fails_when_it_runs)
    with pytest.raises(InvariantError, match="^jit_eager_vmap: Built raises KeyError: 'only without jit'"):
        check_policy(late, only="jit_eager_vmap")

    def reference(q, k, v, *, chunks):
        raise AssertionError("never called")

    with pytest.raises(InvariantError, match="^specification: H2O raises TypeError: .*unexpected keyword argument"):
        check_policy(H2O(recent=2), reference, only="specification", examples=3)
