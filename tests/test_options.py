"""Options of policies: what is meant is what happens, however it was spelled; all else is refused in one line."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import corm_jax as cj
from corm_jax import CormError
from corm_jax.core.capacity import per_layer
from corm_jax.policies import choice, number, size, static, weights
from simulator.construction import check_construction
from simulator.replay import replay, sweep
from simulator.specification import fields_of
from simulator.subject import Implementation
from simulator.synthetic import noise
from simulator.testing import check_policy
from simulator.verify import verify
from tests.mistakes import refused

POLICIES = list(cj.POLICIES.values())


def numeric(kind):
    """The fields of a policy that hold numbers: a leaf, or static."""
    return [one for one in dataclasses.fields(kind) if isinstance(one.default, bool | int | float)]


FIELDS = [
    pytest.param(kind, one, id=f"{kind.__name__}.{one.name}")
    for kind in [*POLICIES, cj.Budget, cj.Protect]
    for one in numeric(kind)
]
SMALL = {  # numbers with which something happens within a few tokens
    cj.Full: {},
    cj.Corm: {"window": 4, "recent": 2, "multiple": 2, "eager": True},
    cj.AdaptiveCorm: {"window": 3, "recent": 2, "multiple": 2, "patience": 2, "trial": 6},
    cj.StreamingLLM: {"sinks": 2},
    cj.Window: {"size": 6},
    cj.H2O: {"recent": 2},
    cj.Scissorhands: {"budget": 6, "recent": 2, "drop": 0.4, "window": 5},
    cj.TOVA: {},
    cj.SnapKV: {"budget": 6, "window": 2, "kernel": 3},
    cj.PyramidKV: {"budget": 6, "window": 2, "kernel": 3},
    cj.AdaKV: {"budget": 6, "window": 2, "floor": 0.4, "kernel": 3},
    cj.L2Norm: {},
    cj.Random: {"seed": 3, "recent": 2},
    cj.Budget: {"tokens": 7, "per_mille": 100},
    cj.Protect: {"sinks": 1, "recent": 2},
}
WRAPS = {cj.Budget, cj.Protect}


def build(kind, **fields):
    inside = {"policy": cj.H2O(recent=1)} if kind in WRAPS else {}
    return kind(**inside, **SMALL[kind] | fields)


def spellings(value):
    """The same number, as people have it."""
    scalars = [np.asarray(value), jnp.asarray(value)]
    if isinstance(value, bool):
        return [np.bool_(value), *scalars]
    if isinstance(value, int):
        return [np.int32(value), np.int64(value), np.uint8(value), np.int8(value), *scalars]
    return [np.float64(value), *scalars[:1]]


def many(values):
    """One number for each head, as people have them, from one for each."""
    return [list(values), tuple(values), np.array(values), jnp.array(values), [np.asarray(one) for one in values]]


# --- D.1: choices


@pytest.mark.parametrize("kind", POLICIES)
def test_every_choice_is_one_of_its_choices(kind):
    for one in dataclasses.fields(kind):
        choices = one.metadata.get("choices", ())
        for value in choices:
            assert getattr(kind(**{one.name: np.str_(value)}), one.name) == value
        for wrong in ("foo", "", f"{one.default} ", str(one.default).upper(), None, 0, True, [one.default], choices):
            if choices:
                refused(f"{one.name} must be {' or '.join(choices)}, not ", kind, **{one.name: wrong})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (cj.Corm, {"group": "max"}),
        (cj.Corm, {"threshold": "foo"}),
        (cj.SnapKV, {"pool": "avg"}),
        (cj.H2O, {"attention": "x"}),
        (cj.StreamingLLM, {"positions": "rope"}),
    ],
)
def test_a_choice_that_is_none(kind, fields):
    refused(f"{next(iter(fields))} must be ", kind, **fields)


@cj.policy
class Mine:
    """As a user writes one."""

    recent: int = number(4, "newest that stay", least=1)
    share: float = number(0.5, "a share", least=0, most=1)
    soft: bool = number(False, "whether")
    plain: int = 3
    scale: float = 1
    budget: int = size(8, "how many stay")
    way: str = choice("one", "other", help="which")
    words: int = static(2, "of state", least=1, most=8)


def test_policies_of_users_are_checked_likewise():
    mine = Mine(recent=np.int64(2), share=1, soft=np.bool_(True), plain=jnp.int32(-3), scale=2.5, words=np.int64(4))
    assert repr(mine) == ("Mine(recent=2, share=1.0, soft=True, plain=-3, scale=2.5, budget=8, way='one', words=4)")
    wrong = {
        "recent": (0, 1.5, True),
        "share": (1.1, float("nan"), "x"),
        "soft": (1, "yes", None),
        "plain": (0.5, "x", True),
        "scale": ("x", float("nan"), None),
        "budget": (0, -1, 1.5, 0.0001, True),
        "way": ("some",),
        "words": (9, 0, [2, 3], 2.0),
    }
    for name, values in wrong.items():
        for value in values:
            assert name in refused(None, Mine, **{name: value})

    @cj.policy
    class Free(cj.Full):
        size: int = static(3, "of whatever size")

    assert [Free(size=size).size for size in (-(2**31), 2**31 - 1)] == [-(2**31), 2**31 - 1]

    @cj.policy
    class Stricter(Mine):
        def __post_init__(self):
            if self.recent > self.words:
                raise CormError(f"more than {self.words} recent ones")

    refused("recent must be a whole number from 1", Stricter, recent=np.array([1, -1]))
    refused("more than 2 recent ones", Stricter, recent=np.int64(3))
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        Mine(2)  # pyright: ignore

    @cj.policy
    class Bounded(cj.Full):
        least: float = number(1.0, "from 0 up", least=0)
        most: float = number(-1.0, "up to 0", most=0)

    refused("least must be at least 0, not -0.5", Bounded, least=-0.5)
    refused("most must be at most 0, not 0.5", Bounded, most=0.5)


@cj.policy
class Trained(cj.Policy):
    """Keys score by a product with weights, whose axes look like layers and heads and are neither."""

    net: Any = weights("[kinds, head_dim]")
    recent: int = number(2, "newest that stay", least=1)

    @property
    def traits(self):
        return cj.Traits(protected=self.recent, recent=self.recent, needs=("keys",))

    def init(self, spec):
        return jnp.zeros(spec.slots, jnp.float32)

    def observe(self, state, observation, slots):
        return (observation.keys.astype(jnp.float32) @ self.net["w"].T).max(-1)

    def score(self, state, slots):
        return jnp.where(slots.newest(self.recent), jnp.inf, state)


def test_weights_are_no_numbers_of_layers_and_heads():
    """Though their axes could be; beside them, numbers are what they were, and gradients reach them."""
    net = {"w": jnp.ones((3, 8)), "b": jnp.zeros(2)}
    inside = cj.budget(cj.protect(Trained(net=net, recent=[[1, 2], [3, 4]]), sinks=1), 6)
    one, other = per_layer(inside, 2)
    assert (one.policy.policy.recent.tolist(), other.policy.policy.recent.tolist()) == ([1, 2], [3, 4])
    np.testing.assert_array_equal(one.policy.policy.net["w"], net["w"])
    cache = cj.make_cache(one, cj.CacheSpec(kv_heads=2, capacity=8, head_dim=8))
    x = jnp.ones((1, 2, 8))
    assert cj.step(one, cache, x[:, :, None], x, x, 1)[1].position.shape == (2, 8)
    check_construction(Trained(net={"w": jnp.ones((3, 16))}))
    refused("policy.policy.recent of shape", cj.make_cache, inside, cj.CacheSpec(kv_heads=2, capacity=8, head_dim=8))


# --- D.2: numbers


@pytest.mark.parametrize(("kind", "one"), FIELDS)
def test_a_number_is_the_same_however_it_is_spelled(kind, one):
    value = SMALL[kind][one.name]
    plain = build(kind)
    for spelled in spellings(value):
        other = build(kind, **{one.name: spelled})
        assert repr(other) == repr(plain)
        assert jax.tree.structure(other) == jax.tree.structure(plain)
    if one.metadata.get("static"):
        refused(f"{one.name} shapes what is compiled", build, kind, **{one.name: [value, value]})
        return
    dtype = {bool: np.bool_, int: np.int32, float: np.float32}[type(value)]
    for rows in ([value, value], [[value, value], [value, value], [value, value]]):
        for spelled in many(rows):
            found = getattr(build(kind, **{one.name: spelled}), one.name)
            assert type(found) is np.ndarray
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, np.array(rows, dtype))
    mine = np.array([value, value])
    policy = build(kind, **{one.name: mine})
    mine[:] = 0
    assert getattr(policy, one.name)[0] == dtype(value)  # not the user's array, which may change


BAD = [True, "3", None, [], {}, 2**31, 2**70, -(2**31) - 1, float("nan"), float("inf"), 1 + 2j, object(), b"3"]
BAD += [
    np.zeros((2, 2, 2), int),
    np.zeros((0, 2), int),
    [[1, 2], [3]],
    [True, 2],
    ["1"],
    np.array(["1"]),
    [None],
    [1, None],
    ["x", 2],
]
BAD += [np.datetime64("2020"), jax.random.key(0), jnp.array([1.0, jnp.nan]), np.float16(np.inf), [1, [2]]]


@pytest.mark.parametrize(("kind", "one"), FIELDS)
def test_what_is_no_number_is_refused(kind, one):
    about = one.metadata
    whole = isinstance(one.default, int) and not isinstance(one.default, bool) and not about.get("size")
    bad = [wrong for wrong in BAD if not (isinstance(one.default, bool) and wrong is True)]
    bad += [0.5, 2.0, jnp.float32(2), np.array([1.0])] if whole else []
    if about.get("size"):
        bad += [0, -1, 0.0, -0.5, 1.5, 0.0004, [4, 0], [0.5, 1.5], [0.5, 4], jnp.int32(0), jnp.float32(-0.5)]
    elif not isinstance(one.default, bool):
        limit = about.get("above", -np.inf) if about["least"] == -np.inf else about["least"] - 1
        bad += [limit, np.array([SMALL[kind][one.name], limit]), jnp.asarray(limit)]
        bad += [about["most"] + 1] if np.isfinite(about["most"]) else []
    for wrong in bad:
        assert one.name in refused(None, build, kind, **{one.name: wrong})


@pytest.mark.parametrize(("kind", "one"), FIELDS)
def test_traced_numbers_are_numbers(kind, one):
    """Inside of jit and vmap; of a number that is traced the dtype and the shape are known."""
    value = SMALL[kind][one.name]

    def make(x):
        return jax.tree.leaves(build(kind, **{one.name: x}))

    if one.metadata.get("static"):
        refused(f"{one.name} shapes what is compiled: it must be one number that is not traced", jax.jit(make), value)
        return
    expected = make(value)
    for leaves in (jax.jit(make)(value), [x[1] for x in jax.vmap(make, out_axes=0)(jnp.array([value, value]))]):
        np.testing.assert_array_equal(np.array(leaves, np.float32), np.array(expected, np.float32))
    if isinstance(value, int) and not isinstance(value, bool):
        assert jax.jit(make)(np.uint8(value))[0].dtype == jnp.int32
    wrong = jnp.complex64(1) if isinstance(value, float) else np.float32(1.5)
    if not (one.metadata.get("size") and not isinstance(value, float)):
        refused(f"{one.name} must be .*not a traced", jax.jit(make), wrong)
    refused(f"{one.name} has the shape", jax.jit(make), np.full((1, 2, 2), value))


ON_A_BUDGET = {cj.StreamingLLM, cj.H2O, cj.TOVA, cj.L2Norm, cj.Random, cj.Protect}


def differing(kind):
    """A policy of which all numbers differ from layer to layer and from head to head, as JAX arrays."""

    def rows(value):
        if isinstance(value, bool):
            return [[True, False], [False, True]]
        return [[value, value + 1], [value + 2, value]] if isinstance(value, int) else [[value, 0.9], [0.2, value]]

    names = [one.name for one in numeric(kind) if not one.metadata.get("static")]
    policy = build(kind, **{name: rows(SMALL[kind][name]) for name in names})
    return jax.tree.map(jnp.asarray, cj.budget(policy, [[7, 9], [8, 7]]) if kind in ON_A_BUDGET else policy)


@pytest.mark.parametrize("kind", [kind for kind in SMALL if SMALL[kind]])
def test_one_for_each_head_of_each_layer(kind):
    """Specification, replay and cache decide alike."""
    policy, trace = differing(kind), noise(layers=2, steps=40, kv_heads=2)
    findings = verify(trace, policy, prompt=30 if policy.traits.whole_prompt else None)
    assert [finding for finding in findings if not finding.held] == []
    assert (replay(trace, policy, prompt=30, errors=False).live[..., -1] < 40).sum() >= 3


@pytest.mark.parametrize("kind", [cj.Corm, cj.Scissorhands, cj.AdaKV])
def test_one_for_each_head_in_a_pool(kind):
    policy = jax.tree.map(lambda x: np.asarray(x)[0], differing(kind))
    check_policy(policy, implementation=Implementation(stores=1), only="specification", examples=5)


def test_numbers_for_unequally_many_heads_or_layers():
    refused("window is for 2 heads and recent for 3: give one number", cj.Corm, window=[1, 2], recent=[1, 2, 3])
    refused("policy.recent is for 2 heads and tokens for 3", cj.budget, cj.H2O(recent=[1, 2]), [3, 4, 5])
    rows = np.ones((2, 2), int)
    refused("window is for 2 layers and recent for 3", cj.Corm, window=rows, recent=np.ones((3, 2), int))
    assert cj.Corm(window=rows, recent=[1, 2]).window.shape == (2, 2)


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        (8, (8, 0)),
        (np.int64(8), (8, 0)),
        (jnp.int32(8), (8, 0)),
        (np.array(8), (8, 0)),
        (np.array([8, 12]), ([8, 12], 0)),
        (jnp.array([[8, 12], [9, 9]]), ([[8, 12], [9, 9]], 0)),
        ([8, np.int32(12)], ([8, 12], 0)),
        (0.25, (0, 250)),
        (np.float32(0.25), (0, 250)),
        (jnp.bfloat16(0.25), (0, 250)),
        (np.array([0.25, 1.0]), (0, [250, 1000])),
        ([0.25, 0.0014], (0, [250, 1])),
    ],
)
def test_sizes_of_a_budget(value, fields):
    made = cj.budget(cj.TOVA(), value)
    assert (np.asarray(made.tokens).tolist(), np.asarray(made.per_mille).tolist()) == fields
    traced = jax.jit(lambda x: jax.tree.leaves(cj.budget(cj.TOVA(), x)))(jnp.asarray(value))
    assert tuple(np.asarray(one).tolist() for one in traced) == fields


def test_a_budget_that_cannot_be():
    for wrong in (0, -1, True, "8", None, 1.5, 0.0004, float("nan"), float("inf"), 2**31, [8, 0], [0.5, 8], [], {}):
        refused("budget", cj.budget, cj.TOVA(), wrong)
    refused("tokens must be a whole number from 0", cj.Budget, policy=cj.TOVA(), tokens=-5, per_mille=99999)
    refused("per_mille must be a whole number from 0 to 1000, not 99999", cj.Budget, policy=cj.TOVA(), per_mille=99999)
    refused("a budget must be a whole number of keys from 1 up", cj.Budget, policy=cj.TOVA())
    sinks = cj.protect(cj.TOVA(), sinks=np.array([0, 4]))
    refused("a budget of 3 keys is below the 4 that the policy never evicts", cj.budget, sinks, 3)
    assert cj.budget(sinks, [1, 4]).tokens.tolist() == [1, 4]
    refused("a budget of 3 keys is below the 4", cj.budget, sinks, [4, 3])
    refused("would protect 2147483652 keys", cj.protect, cj.H2O(recent=2**31 - 1), sinks=5)
    for wrong in ("tova", cj.TOVA, None, [cj.TOVA()], 3):
        for wrap in (lambda x: cj.budget(x, 8), cj.protect, cj.oneshot, lambda x: cj.Budget(policy=x, tokens=8)):
            refused("a policy must be an object such as", wrap, wrong)


def test_the_specification_knows_jax_arrays():
    policy = jax.tree.map(jnp.asarray, cj.Corm(window=[[3, 6]], recent=[2, 1], eager=[True, False]))
    assert fields_of(policy, 1, 0) | {"threshold": 0, "group": 0} == {
        "window": 6, "recent": 1, "multiple": 1, "eager": False, "threshold": 0, "group": 0,
    }  # fmt: skip


# --- D.3: budgets

BASES = (
    "tova",
    "h2o:recent=2",
    "corm:window=4,recent=2",
    "snapkv:window=2,kernel=3",
    "pyramidkv:window=2",
    "adakv:window=2",
)
BASES += ("scissorhands:recent=2", "random", "streaming_llm:sinks=2", "l2norm", "adaptive_corm:window=3,recent=2")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("more", ["", "sinks=1", "oneshot=true", "sinks=2,oneshot=true"])
def test_a_budget_means_in_python_what_it_means_in_a_spec(base, more):
    colon = "," if ":" in base else ":"
    options = [
        option for option in more.split(",") if option and not (base.startswith("streaming") and "sinks" in option)
    ]
    for amount in (16, 0.25):
        spec = f"{base}{colon}{','.join([*options, f'budget={amount}'])}"
        inner = cj.parse(f"{base}{colon}{','.join(o for o in options if 'oneshot' not in o)}")
        policy = cj.budget(inner, amount)
        policy = cj.oneshot(policy) if "oneshot=true" in options else policy
        assert repr(policy) == repr(cj.parse(spec))


def test_a_budget_of_the_prompt():
    """Issue 16, D.3: 26 keys are 16 of the prompt and the ten that follow, in Python and in a SPEC."""
    trace = noise(layers=2, steps=50)
    for amount, first in ((16, 16), (0.25, 10), (1.0, 40), (0.001, 4)):
        for policy in (cj.budget(cj.SnapKV(window=4), amount), cj.parse(f"snapkv:window=4,budget={amount}")):
            assert (replay(trace, policy, prompt=40).live[:, :, -1] == first + 10).all()
    refused("SnapKV has a budget of its own", cj.Budget, policy=cj.SnapKV(window=4), tokens=16)
    refused("Scissorhands has a budget of its own", cj.Budget, policy=cj.protect(cj.Scissorhands()), tokens=16)
    refused("a budget of 3 keys is below the window of 4: raise it", cj.budget, cj.SnapKV(window=4), 3)
    refused("a budget of 8 keys is below the newest 10, which stay: raise it", cj.budget, cj.Scissorhands(), 8)


@pytest.mark.parametrize("policy", [cj.L2Norm(), cj.Corm(window=3, recent=2)])
def test_a_budget_and_oneshot_in_either_order(policy):
    trace = noise(layers=1, steps=48, kv_heads=1)
    pair = cj.oneshot(cj.budget(policy, 9)), cj.budget(cj.oneshot(policy), 9)
    results = [replay(trace, one, prompt=40, errors=False) for one in pair]
    np.testing.assert_array_equal(results[0].until, results[1].until)
    assert (results[0].live[0, 0, 38:40] == [39, 9]).all()
    assert all(finding.held for finding in verify(trace, pair[1], prompt=40))


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv:budget=0.3,window=3,kernel=3,sinks=2,recent=1",
        "pyramidkv:budget=0.4,window=2,kernel=1",
        "adakv:budget=0.3,window=2,kernel=3",
        "scissorhands:budget=0.3,window=5,recent=2,drop=0.05,sinks=1",
    ],
)
def test_shares_are_those_of_the_specification(spec):
    trace = noise(layers=3, steps=60, kv_heads=1)
    findings = verify(trace, cj.parse(spec), prompt=50, chunk=1)
    assert [finding for finding in findings if not finding.held] == []


def test_shares_by_hand():
    """A quarter of 40 tokens is ten keys: b = 8 beside the window; 16, 8 and 0 in three layers of a pyramid."""
    trace = noise(layers=3, steps=60)
    found = replay(trace, cj.PyramidKV(budget=0.25, window=2), prompt=40).live[:, :, 39]
    assert found.tolist() == [[18, 18], [10, 10], [2, 2]]
    found = replay(trace, cj.AdaKV(budget=0.25, window=2), prompt=40).live[:, :, 39].sum(-1)
    assert (abs(found - 20) <= 1).all()
    live = replay(trace, cj.Scissorhands(budget=0.5, recent=4, window=8, drop=0.001)).live[0, 0]
    assert live.tolist() == [max(t // 2, min(t, 4)) for t in range(1, 61)]


def test_a_sweep_mixes_no_shares_and_numbers():
    trace = noise(layers=1, steps=40)
    result = sweep(trace, lambda budget: cj.SnapKV(window=4, budget=budget), {"budget": [0.25, 0.5]}, prompt=40)
    assert result.live[:, 0, 0, -1].tolist() == [10, 20]
    mixed = {"budget": [12, 0.25]}
    refused("mixes whole numbers and shares", sweep, trace, lambda budget: cj.SnapKV(window=4, budget=budget), mixed)
    result = sweep(trace, lambda budget: cj.budget(cj.TOVA(), budget), mixed)
    assert result.live[:, 0, 0, -1].tolist() == [12, 10]


@pytest.mark.parametrize("spec", ["tova", "h2o:recent=2", "l2norm:sinks=2", "full", "tova:budget=8", "corm"])
def test_commands_say_that_nothing_is_evicted(spec, capsys):
    from corm_jax.terminal.console import note_budgets

    note_budgets([spec, spec])
    said = capsys.readouterr().err
    name, expected = spec.split(":")[0], spec in ("tova", "h2o:recent=2", "l2norm:sinks=2")
    assert bool(said) == expected
    if expected:
        assert said.startswith(f"corm: note: {spec} has no budget, so that every key stays: add one, as in {name}:")
        assert said.count("\n") == 1
        assert (replay(noise(layers=1, steps=30), cj.parse(spec)).live[..., -1] == 30).all()
        cj.parse(re.search(r"as in (\S+)", said)[1])


@pytest.mark.parametrize(
    ("spec", "prompt", "said"),
    [
        ("h2o:budget=0.1,recent=20", None, "10 keys of a head after 100 tokens, but 20 are never evicted (recent=20)"),
        ("tova:budget=0.1,sinks=8,recent=20", None, "but 28 are never evicted (recent=20, sinks=8), so that 28 keys"),
        ("scissorhands:budget=0.1,recent=20", None, "but 20 are never evicted (recent=20)"),
        (
            "snapkv:budget=0.1,window=20",
            100,
            "10 keys of a head after 100 tokens, but 20 are never evicted (window=20)",
        ),
        (
            "h2o:budget=0.1",
            None,
            "but 256 are never evicted (recent=256), so that no key is evicted: lower recent, raise",
        ),
        ("h2o:budget=0.1,recent=10", None, ""),
        ("h2o:budget=30,recent=10", None, ""),
        ("snapkv:budget=0.1,window=10", 100, ""),
        ("corm", None, ""),
    ],
)
def test_commands_say_that_a_share_is_less_than_what_is_protected(spec, prompt, said, capsys):
    from corm_jax.terminal.console import note_small_budgets

    note_small_budgets([spec, spec], 100, prompt)
    note = capsys.readouterr().err
    assert (note.count("\n"), said in note) == (bool(said), True), note
    kept = int(replay(noise(layers=1, steps=100), cj.parse(spec), prompt=prompt).live[0, 0, -1])
    protected = re.search(r"but (\d+) are never", note)
    if protected:
        assert note.startswith(f"corm: note: {spec}: the budget is 10 keys")
        assert kept == min(int(protected[1]), 100) > 10
    elif "budget" in spec:
        assert kept <= 30


def test_the_commands_do_say_that_it_is_less(run_main, model, tmp_path):
    from corm_jax.command import cli
    from simulator import cli as simulator

    noise(layers=1, steps=20).save(tmp_path / "trace")
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times. " * 3)
    spec, common = "h2o:budget=0.25,recent=9", ("--model", model, "--chunk", 4)
    text = (*common, "--text", tmp_path / "text", "--tokens", 12, "--policy", spec)
    for main, *arguments in (
        (simulator.main, "simulator", "replay", tmp_path / "trace", "--policy", spec, "--no-errors"),
        (cli.main, "corm", "compare", *text),
        (cli.main, "corm", "generate", *common, "--prompt", "It was", "--max-new-tokens", 2, "--policy", spec),
        (cli.main, "corm", "eval", "perplexity", *text, "--limit", 1, "--out", tmp_path / "out"),
    ):
        code, _, err = run_main(main, *arguments)
        assert (code, err.count("but 9 are never evicted (recent=9), so that ")) == (0, 1), err
    code, _, err = run_main(cli.main, "corm", "eval", "perplexity", *text[:-1], "h2o:recent=9", "--budget", "0.25",
                            "--limit", 1, "--out", tmp_path / "other")  # fmt: skip
    assert (code, "the shortest prompt 12: a budget of 3 keys is below the 9" in err) == (2, True), err


def test_the_commands_do_say_it(run_main, model, tmp_path):
    from corm_jax.command import cli
    from simulator import cli as simulator

    noise(layers=1, steps=20).save(tmp_path / "trace")
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times. " * 3)
    common = "compare", "--model", model, "--text", tmp_path / "text", "--tokens", 12, "--policy", "tova"
    for expected, main, *arguments in (
        (1, simulator.main, "simulator", "replay", tmp_path / "trace", "--policy", "tova", "--no-errors"),
        (0, simulator.main, "simulator", "replay", tmp_path / "trace", "--policy", "tova", "--capacity", 8),
        (1, cli.main, "corm", *common),
        (0, cli.main, "corm", *common, "--budget", 8),
    ):
        code, _, err = run_main(main, *arguments)
        assert (code, err.count("note: tova has no budget, so that every key stays")) == (0, expected)
