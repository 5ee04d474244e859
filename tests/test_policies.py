"""The policies of the field: the conformance suite, and sets of survivors worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import TOVA, AdaKV, Corm, CormError, Random, Scissorhands, SnapKV, budget, oneshot, parse, protect
from corm_jax.core.capacity import slots_for
from corm_jax.policies import POLICIES, Budget, Protect, keys_of, on_budget
from corm_jax.traces.trace import Trace
from simulator.replay import replay, sweep
from simulator.specification import readings, rule_of
from simulator.synthetic import noise
from simulator.testing import check_policy, parametrize_checks
from simulator.verify import drive, verify
from tests.checks import quick
from tests.heads import chunks_of, live_sets, slots_of
from tests.test_nine_tokens import head, words

SPECS = [
    "full:budget=5",
    "streaming_llm:sinks=2,budget=6",
    "window:size=5",
    "h2o:recent=2,budget=5",
    "scissorhands:budget=6,window=5,recent=2",
    "tova:budget=5",
    "l2norm:budget=5",
    "random:budget=5",
    "corm:window=4,recent=2,budget=4,sinks=1",
    "adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=6",
    "snapkv:budget=5,window=2,kernel=3",
    "adakv:budget=5,window=2,kernel=3,floor=0.5",
]
VARIANTS = [
    "h2o:recent=2,attention=mean,budget=0.4",
    "corm:window=3,recent=2,oneshot=true",
    "adaptive_corm:window=2,recent=1,multiple=1,patience=4,trial=0,budget=6,sinks=1",
    "snapkv:budget=4,window=1,kernel=5,pool=mean,sinks=1",
    "pyramidkv:budget=6,window=3,kernel=1",
]
"""Further choices of the same policies."""


@quick(parametrize_checks(*map(parse, SPECS), examples=5))
def test_conformance(check):
    check()


@pytest.mark.slow
@parametrize_checks(*map(parse, VARIANTS), examples=5)
def test_conformance_of_variants(check):
    check()


UNEQUAL = {
    # 4 keys of the second head stay, whatever the layer looks at.
    "tova": lambda: budget(protect(TOVA(), sinks=np.array([0, 4])), 8),
    "tova, by size": lambda: Budget(policy=TOVA(), tokens=np.array([4, 7])),
    "adakv": lambda: AdaKV(budget=np.array([4, 7]), window=np.array([1, 3]), kernel=3),
    "adakv, floors": lambda: AdaKV(budget=5, window=2, kernel=3, floor=np.array([0.5, 0.1])),
    "scissorhands": lambda: Scissorhands(budget=np.array([5, 7]), window=5, recent=2, drop=np.array([0.5, 0.2])),
    "corm": lambda: Corm(window=np.array([3, 6]), recent=np.array([2, 1]), eager=np.array([True, False])),
}


@pytest.mark.parametrize(
    "check", ["specification", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layouts", "replays_alike"))]
)
@pytest.mark.parametrize("name", UNEQUAL)
def test_heads_that_keep_different_numbers(name, check):
    check_policy(UNEQUAL[name](), only=check, examples=10)


# Worked by hand, on the nine tokens of the README: what each query looks at is in test_nine_tokens.ASKED.
NINE = {
    # The first token and the newest three.
    "streaming_llm:sinks=1,budget=4": {
        5: "The sat on the",
        6: "The on the mat",
        7: "The the mat because",
        8: "The mat because it",
        9: "The because it purred",
    },
    # The next query sees itself and the three before it.
    "window:size=4": {
        3: "The cat sat",
        4: "cat sat on",
        5: "sat on the",
        9: "because it purred",
    },
    # Attention so far at t = 5: The 11/6, cat 1, sat 5/6 (goes); on and the are the newest. t = 6: cat 1 goes, against
    # The 13/6 and on 5/3. t = 7: the 0. t = 8: mat 1/3. t = 9: because 1/2.
    "h2o:recent=2,budget=4": {
        5: "The cat on the",
        6: "The on the mat",
        7: "The on mat because",
        8: "The on because it",
        9: "The on it purred",
    },
    # Query 5 looks at on alone: all others are equal, so the oldest goes; and so on, whatever drew attention before.
    "tova:budget=4": {
        5: "cat sat on the",
        6: "sat on the mat",
        7: "on the mat because",
        8: "the mat because it",
        9: "mat because it purred",
    },
    # At t = 5 there are five. Of queries 3 to 5, two found The and cat unimportant, one sat, none on: two go at once.
    # At t = 7 three of three found sat and the unimportant. At t = 9, on and mat (3 of 3), against because (2).
    "scissorhands:budget=4,window=3,recent=1": {
        5: "sat on the",
        6: "sat on the mat",
        7: "on mat because",
        8: "on mat because it",
        9: "because it purred",
    },
    # At t = 5 cat was important least recently (3), at t = 6 sat (4). At t = 7 the goes by CORM's own rule. At t = 8 on
    # and mat tie (6), so the older goes, at t = 9 mat.
    "corm:window=4,recent=2,budget=4": {
        5: "The sat on the",
        6: "The on the mat",
        7: "The on mat because",
        8: "The mat because it",
        9: "The because it purred",
    },
    # A trial of six: as CORM from t = 7 on.
    "adaptive_corm:window=3,recent=1,multiple=1,patience=1,trial=6": {
        6: "The cat sat on the mat",
        7: "The on mat because",
        8: "The on mat because it",
        9: "The because it purred",
    },
    # Of seven: query 8 looks at The, just asked for, and at cat, last asked for at 3, so that CORM would have let it go
    # at t = 7. That return pays for one query. At t = 9 CORM judges: sat 4, on and mat 6 are too long ago.
    "adaptive_corm:window=3,recent=1,multiple=1,patience=1,trial=7": {
        7: "The cat sat on the mat because",
        8: "The cat sat on the mat because it",
        9: "The cat because it purred",
    },
}


PROMPTS = {
    # Queries 6 and 7 judge: The gets 1/3 + 1/2, on 1/3. Three stay beside their own keys: with The and on the newest of
    # those that got nothing.
    ("snapkv:budget=5,window=2,kernel=1", 7): {
        6: "The cat sat on the mat",
        7: "The on the mat because",
        9: "The on the mat because it purred",
    },
    # With its neighbours cat is worth 5/6 as well; sat, on and the 1/3 each, so the older two go.
    ("snapkv:budget=5,window=2,kernel=3", 7): {
        6: "The cat sat on the mat",
        7: "The cat the mat because",
        9: "The cat the mat because it purred",
    },
    # Queries 7 and 8: The 1/2 + 1/3, cat 1/3; in the mean with their neighbours 7/18 both, sat 1/9, others nothing.
    ("snapkv:budget=4,window=2,kernel=3,pool=mean", 8): {
        7: "The cat sat on the mat because",
        8: "The cat because it",
        9: "The cat because it purred",
    },
    # CORM, once seven were read: nobody asked for cat and the in queries 4 to 7.
    ("corm:window=4,recent=2,oneshot=true", 7): {
        6: "The cat sat on the mat",
        7: "The sat on mat because",
        8: "The on mat because it",
    },
}


@pytest.mark.parametrize(("spec", "prompt"), [*((spec, None) for spec in NINE), *PROMPTS])
def test_nine_tokens_by_hand(spec, prompt):
    q, k, v = (x[:, None] for x in head())
    policy, survivors = parse(spec), PROMPTS[spec, prompt] if prompt else NINE[spec]
    (expected,) = readings(policy, q, k, v, prompt=prompt or np.inf)
    assert {t: words(expected.kept[t - 1]) for t in survivors} == survivors
    kept = replay(Trace.from_qkv(q[None, :, 0], k[None], v[None]), policy, prompt=prompt).history()[0, 0]
    assert {t: words(np.flatnonzero(kept[t - 1])) for t in survivors} == survivors


def test_equal_sums_are_equal_in_any_order():
    """The mean of 0.3, 0.7 and 0.9 is the same in whichever order they stand, so the older keys go."""
    scores = jnp.asarray([[0.3, 0.7, 0.9, 0.3, 0.7, 0.9, 0.3, 0.7, 0.0]], jnp.float32)
    slots = slots_of(np.arange(9)[None], seen=9, prompt=9)
    pooled = SnapKV(budget=4, window=1, kernel=3, pool="mean").verdict(scores, slots)[0]
    assert np.isin(np.arange(9), [4, 5, 6, 8]).tolist() == (pooled[:9] >= 0).tolist()
    assert len(set(pooled[4:7].tolist())) == 1


def test_heads_that_share_a_budget_by_hand():
    """The last of six queries judges: four keys of the first head get 1/4, one of the second head all.

    Of ten keys the best four are the latter and three of the former: c = 3 and 1. With floor 0.2 and b = 2 that is
    2.8 and 1.2, so 3 and 1 stay, and the last.
    """
    looks = [[0, 1, 2, 3], [4]]
    k = 30 * np.repeat(np.eye(6, dtype=np.float32)[:, None], 2, axis=1)
    q = np.zeros_like(k)
    for head_, keys in enumerate(looks):
        q[5, head_, keys] = 30
    policy = parse("adakv:budget=3,window=1,kernel=1")
    survivors = [{1, 2, 3, 5}, {4, 5}]
    assert [one.kept[-1] for one in readings(policy, q[:, :, None], k, k, prompt=6)] == survivors
    kept = replay(Trace.from_qkv(q[None], k[None], k[None]), policy, prompt=6).history()[0, :, -1]
    assert [set(np.flatnonzero(row)) for row in kept] == survivors


@pytest.mark.parametrize("layers", [1, 2, 3, 30])
@pytest.mark.parametrize("budget_", [32, 33, 52, 100, 512, 1001])
def test_a_pyramid_of_budgets(layers, budget_):
    policy = parse(f"pyramidkv:budget={budget_}")
    budgets = [int(policy.for_layer(layer, layers).beside(10**6)) + 32 for layer in range(layers)]
    assert budgets == [rule_of(policy, 0, layer, layers).beside() + 32 for layer in range(layers)]
    assert sum(budgets) == layers * budget_
    if layers == 30 and budget_ == 512:  # b = 480: from 936 to 24, and the window
        assert (budgets[0], budgets[-1]) == (968, 56)


def test_each_layer_has_its_own_budget():
    """b = 16: an arithmetic sequence from 32 to 0, and the window."""
    trace, spec = noise(layers=4, steps=60), "pyramidkv:budget=20,window=4"
    assert replay(trace, parse(spec), prompt=50).live[:, 0, 49].tolist() == [36, 25, 15, 4]
    grid = sweep(trace, lambda budget: parse(f"pyramidkv:window=4,budget={budget}"), {"budget": [12, 20]}, prompt=50)
    assert grid.live[1, :, 0, 49].tolist() == [36, 25, 15, 4]
    for options in ("", ",oneshot=true,sinks=1"):
        assert all(finding.held for finding in verify(trace, parse(spec + options), prompt=50))


def test_a_prompt_shorter_than_the_budget_stays_whole():
    for spec in ("snapkv", "adakv", "snapkv:pool=mean,budget=40"):
        result = replay(noise(steps=40), parse(spec), prompt=39)
        assert (result.live[..., -1] == 40).all()


def test_norms_by_hand():
    """Norms 3 1 2 5 1 4 and room for three: 5 goes as soon as it comes, then 3, then 4."""
    k = np.array([3, 1, 2, 5, 1, 4], np.float32)[None, :, None, None]
    kept = replay(Trace.from_qkv(k, k, k), parse("l2norm:budget=3")).history()[0, 0]
    assert [np.flatnonzero(row).tolist() for row in kept[3:]] == [[0, 1, 2], [1, 2, 4], [1, 2, 4]]


def test_random_is_a_fair_draw():
    """Each step one of 101 keys goes: a key of age a is left with probability (100 / 101)^a."""
    trace = noise(layers=20, steps=400, kv_heads=5)
    kept = replay(trace, parse("random:budget=100"), errors=False).history()[:, :, -1]
    assert (kept.sum(-1) == 100).all()
    assert len({row.tobytes() for row in kept.reshape(-1, 400)}) == 100  # every head of every layer draws for itself
    share = kept.mean((0, 1)).reshape(8, 50).mean(-1)
    age = 399 - np.arange(400)
    expected = np.where(age < 299, (100 / 101) ** age, (100 / 101.0) ** 299).reshape(8, 50).mean(-1)
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 5000))
    again, other = (replay(trace, budget(Random(seed=seed), 100), errors=False).until for seed in (0, 1))
    np.testing.assert_array_equal(again, replay(trace, parse("random:budget=100"), errors=False).until)
    assert (again != other).any()


ENDLESS_TRIAL = "adaptive_corm:window=2,recent=1,multiple=1,trial=2147483647"


def test_a_budget_beyond_the_text_keeps_everything():
    for spec in (
        "tova:budget=500",
        "h2o:budget=1.0",
        "streaming_llm:sinks=99,budget=200",
        "l2norm:budget=1.0",
        ENDLESS_TRIAL,
    ):
        result = replay(noise(steps=40), parse(spec))
        assert (result.live[..., -1] == 40).all()
        assert np.isfinite(result.mass).all()


def test_a_share_grows_with_the_text():
    live = replay(noise(steps=100), parse("h2o:recent=2,budget=0.25")).live[0, 0]
    assert live.tolist() == [max(t // 4, 2) if t > 2 else t for t in range(1, 101)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o:recent=64,budget=32", "a budget of 32 keys is below the 64 that the policy never evicts: raise it"),
        ("tova:sinks=4,recent=32,budget=20", "a budget of 20 keys is below the 36"),
        ("tova:budget=1.5", r"a budget that is a share must be in \(0, 1\], by the thousandth, not 1.5"),
        ("tova:budget=0.0", "must be in"),
        ("tova:budget=0", "a budget must be a whole number of keys from 1 up, or a share such as 0.25, not 0"),
        ("tova:budget=-4", "not -4"),
        ("tova:budget=x", "a budget must be a whole number of keys from 1 up, or a share such as 0.25, not 'x'"),
        ("tova:sinks=-1", "sinks must be a whole number from 0"),
        (
            "tova:protect=4",
            "unknown option 'protect=4' in 'tova:protect=4': tova has budget=..., sinks=..., recent=...",
        ),
        ("adaptive_corm:patience=0", "patience must be a whole number from 1"),
        ("adaptive_corm:trial=-1", "trial must be a whole number from 0"),
        ("scissorhands:drop=0", "drop must be above 0 and at most 1, not 0 "),
        ("keyformer:budget=9", "unknown policy 'keyformer'"),
        ("snapkv:budget=16", "a budget of 16 keys is below the window of 32: raise it"),
        ("snapkv:kernel=4", "kernel must be odd, not 4"),
        ("adakv:floor=1.5", r"floor must be in \[0, 1\], not 1.5"),
        ("tova:oneshot=1", "oneshot must be true or false, not 1"),
    ],
)
def test_what_cannot_work_is_said(spec, message):
    with pytest.raises(CormError, match=message):
        parse(spec)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "waits for the end of the prompt: say how many of the tokens are the prompt"),
        (0, "prompt must be a whole number from 1"),
        (41, "a prompt of 41 tokens does not end within a text of 40: say fewer"),
    ],
)
def test_who_waits_for_the_prompt_must_know_where_it_ends(prompt, message):
    for spec in ("snapkv", "corm:oneshot=true"):
        with pytest.raises(CormError, match=message):
            replay(noise(steps=40), parse(spec), prompt=prompt)


def test_guards_add_up():
    policy = protect(budget(parse("h2o:recent=3"), 8), sinks=2, recent=1)
    assert policy.traits.protected == 6
    kept = replay(noise(steps=60), policy).history()[:, :, -1]
    assert kept[..., :2].all()
    assert kept[..., -3:].all()


@pytest.mark.parametrize("chunk", [1, 8])
def test_scissorhands_holds_its_budget_however_little_it_drops(chunk):
    """A tenth of six is less than one key: as many are evicted as are too many, and the newest two never."""
    policy = parse("scissorhands:budget=6,window=5,recent=2,drop=0.1")
    kept = replay(noise(steps=48), policy, chunk=chunk, errors=False).history()[0, :, 7::chunk]
    assert (kept.sum(-1) == 6).all()
    for step, row in enumerate(kept.swapaxes(0, 1)):
        assert row[:, 8 + chunk * step - 2 : 8 + chunk * step].all()


def test_scissorhands_may_drop_all_but_the_newest():
    """When seven are live, ``drop=1.0`` asks for six of them, and ``recent=2`` leaves five: at clock 7, and at 12."""
    policy = parse("scissorhands:budget=6,window=5,recent=2,drop=1.0")
    kept = replay(noise(steps=13), policy, errors=False).history()[0]
    assert kept.sum(-1).tolist() == [[1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 2, 3]] * 2
    for t in (7, 12):
        assert np.flatnonzero(kept[0, t - 1]).tolist() == [t - 2, t - 1]


def test_equal_attention_is_important():
    """Keys that share a query's attention equally get 1/t each: scissorhands sets no bit for any of them."""
    x = jnp.ones((3, 1, 2, 8))
    _, _, cache = drive(Scissorhands(window=8), x, x[:, :, 0], x[:, :, 0], 3, capacity=4, chunk=3)
    assert not cache.state.any()


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_return_at_the_first_clock_at_which_corm_would_evict(chunk):
    """w = 3, r = 1: at clock 3 CORM would evict key 1, which nobody asked for. Query 4 asks for it: one return.

    The return pays for four queries after a trial of four. At clock 9 all but key 0 and the newest are dormant.
    """
    k = 30 * np.eye(9, dtype=np.float32)[:, None]
    q = k[[0, 0, 0, 1, 0, 0, 0, 0, 0]][:, :, None]
    policy = parse("adaptive_corm:window=3,recent=1,multiple=1,patience=4,trial=4")
    everything = [{*range(t)} for t in range(1, 9)]
    (expected,) = readings(policy, q, k, k, chunks=chunks_of(9, chunk))
    assert expected.kept == [*everything[chunk - 1 :: chunk], {0, 8}]
    q, k = (jnp.asarray(np.concatenate([x, x[:3]])) for x in (q, k))  # padded to whole chunks
    _, position, _ = drive(policy, q, k, k, 9, capacity=9, chunk=chunk)
    assert [live_sets(one[0]) for one in position[: len(expected.kept)]] == expected.kept


DEFAULTS = {
    "full": {},
    "corm": {"window": 256, "recent": 256, "multiple": 1, "threshold": "position", "group": "any", "eager": False},
    "adaptive_corm": {"window": 256, "recent": 128, "multiple": 16, "patience": 5, "trial": 768},
    "streaming_llm": {"sinks": 4, "positions": "original"},
    "window": {"size": 512},
    "h2o": {"recent": 256, "attention": "sum"},
    "scissorhands": {"budget": 512, "window": 400, "recent": 10, "drop": 0.5},
    "tova": {},
    "snapkv": {"budget": 512, "window": 32, "kernel": 7, "pool": "max"},
    "pyramidkv": {"budget": 512, "window": 32, "kernel": 7, "pool": "max"},
    "adakv": {"budget": 512, "window": 32, "kernel": 7, "pool": "max", "floor": 0.2},
    "l2norm": {},
    "random": {"seed": 0, "recent": 1},
}
"""As the papers have them, where they say."""

LEAST = {  # of each number of a policy
    "corm": {"window": 1, "recent": 1, "multiple": 1},
    "adaptive_corm": {"window": 1, "recent": 1, "multiple": 1, "patience": 1, "trial": 0},
    "streaming_llm": {"sinks": 0},
    "window": {"size": 1},
    "h2o": {"recent": 0},
    "scissorhands": {"budget": 1, "window": 1, "recent": 0},
    "snapkv": {"window": 1, "kernel": 1},
    "random": {"seed": 0, "recent": 0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    policy = POLICIES[name]()
    assert {option: getattr(policy, option) for option in DEFAULTS[name]} == DEFAULTS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.recent = 3


@pytest.mark.parametrize("name", LEAST)
def test_numbers_have_a_least_value(name):
    others = {"recent": 0} if name == "scissorhands" else {}  # they fit into the least budget
    for option, least in LEAST[name].items():
        assert getattr(POLICIES[name](**others | {option: least}), option) == least
        with pytest.raises(CormError, match=f"{option} must be"):
            POLICIES[name](**others | {option: least - 1 if option != "kernel" else -1})


def test_shares_have_bounds():
    for floor in (0.0, 1.0):
        assert AdaKV(floor=floor).floor == floor
    for drop in (1e-3, 1.0):
        assert Scissorhands(drop=drop).drop == drop
    for make in (lambda x: AdaKV(floor=x), lambda x: Scissorhands(drop=x)):
        for value in (-0.01, 1.01):
            with pytest.raises(CormError, match="must be"):
                make(value)
    assert budget(TOVA(), 1).tokens == 1
    assert (budget(TOVA(), 1.0).per_mille, budget(TOVA(), 0.001).per_mille) == (1000, 1)


@pytest.mark.parametrize(
    ("spec", "protected"),
    [
        *(("full", 0), ("tova", 0), ("l2norm", 0), ("snapkv", 0), ("corm:recent=7", 7), ("adaptive_corm:recent=7", 7)),
        *(("h2o:recent=7", 7), ("random:recent=7", 7), ("scissorhands:recent=7", 7), ("streaming_llm:sinks=7", 7)),
        *(("window:size=7", 7), ("window:size=1", 1)),
        *(("tova:sinks=3", 3), ("tova:recent=4", 4), ("tova:sinks=3,recent=4,budget=9", 7), ("tova:oneshot=true", 0)),
    ],
)
def test_keys_that_are_never_given_up(spec, protected):
    assert parse(spec).traits.protected == protected
    assert Protect(policy=parse(spec)).traits.protected == protected


@pytest.mark.parametrize("name", POLICIES)
def test_numbers_may_be_traced(name):
    """So that a policy can be made inside a program, on a budget and protected: only concrete numbers are checked."""
    kind = POLICIES[name]
    numbers = {
        field.name: getattr(kind(), field.name)
        for field in dataclasses.fields(kind)
        if not field.metadata.get("static")
    }

    def make(given, sinks, recent):
        return jax.tree.leaves(budget(protect(oneshot(kind(**given)), sinks=sinks, recent=recent), 600))

    assert len(jax.eval_shape(make, numbers, 3, 4)) >= len(numbers) + 2


def test_a_share_for_one_head_needs_slots_for_the_text():
    """A budget that is a share in any head depends on the text; one of keys alone says how many slots are enough."""
    assert slots_for(Budget(policy=TOVA(), tokens=9), None, 100, 4) == 13
    assert slots_for(Budget(policy=TOVA(), tokens=np.array([4, 9])), None, 100, 4) == 13
    assert slots_for(Budget(policy=TOVA(), tokens=9, per_mille=np.array([0, 500])), None, 100, 4) == 100
    assert slots_for(budget(TOVA(), 9), None, 10, 4) == 10
    assert slots_for(budget(TOVA(), 9), None, 2, 4) == 4
    assert slots_for(TOVA(), None, 2, 4) == 4


def test_what_a_budget_is_in_keys():
    given = {"1": 1, "7": 7, "0.25": 12, "1.0": 50, "0.001": 1}
    assert {size: keys_of(size, 50) for size in given} == given
    for size in ("0", "-3", "0.0", "1.5", "-0.5"):
        with pytest.raises(CormError, match=f"a share in .*, not {size}"):
            keys_of(size, 50)
    with pytest.raises(CormError, match="a budget must be a whole number .*, not 0.x"):
        keys_of("0.x", 50)


def test_a_spec_on_a_budget():
    specs = {
        "tova": "tova:budget=9",
        "h2o": "h2o:recent=4,budget=9",
        "h2o:attention=mean": "h2o:attention=mean,recent=4,budget=9",
        "h2o:recent=2": "h2o:recent=2,budget=9",
        "corm:window=3": "corm:window=3,budget=9",
        "tova:budget=0.5": "tova:budget=0.5",
        "full": "full",
    }
    assert {spec: on_budget(spec, 9) for spec in specs} == specs
