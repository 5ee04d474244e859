"""Calibration: costs against replays and loops, choices against all assignments, from making a profile to its use."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from corm_jax import CormError, Window, parse
from corm_jax.command import cli
from corm_jax.model.decoder import policies_of
from corm_jax.policies.plan import Plan
from corm_jax.policies.profile import EVERYTHING, Profile
from corm_jax.runs import calibrate
from corm_jax.runs.recording import record
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from tests.models import tiny
from tests.test_checkpoint import TEXT

MODEL = tiny()
IDS = np.random.default_rng(0).integers(0, 97, 300).tolist()


def trace(one):
    return Trace.from_qkv(one.q[None], one.k[None], one.v[None])


def policy(place):
    window, recent, multiple = calibrate.CHOICES[place]
    return parse(f"corm:window={window},recent={recent},multiple={multiple},group=mean,sinks=4")


@pytest.mark.parametrize("choice", [(16, 32, 1), (32, 32, 2), (64, 128, 16)])
def test_what_a_choice_keeps_and_loses(choice):
    """By a replay, and in loops: outputs from what it keeps, in float64."""
    again, place = 60, calibrate.CHOICES.index(choice)
    one = next(record(MODEL, [*IDS, *IDS[:again]]))
    (tokens, kv_heads, head_dim), group = one.k.shape, one.q.shape[1] // one.k.shape[1]
    gradient = np.random.default_rng(1).normal(size=(tokens, kv_heads, group, head_dim)).astype(np.float32)
    found = calibrate.measure(one, gradient[:300], gradient[300:])
    assert [x[-1].tolist() for x in found] == [[1, 1], [0, 0], [0, 0]]  # all keys

    until = replay(trace(one), policy(place), chunk=calibrate.CHUNK).until[0]
    np.testing.assert_allclose(found.live[place], (until[:, :300] > 320).mean(1))  # 320: the end of 300's chunk
    change = np.zeros((tokens, kv_heads))
    for t, head, member in np.ndindex(tokens, kv_heads, group):
        weights = np.exp(one.k[: t + 1, head].astype(np.float64) @ one.q[t, head * group + member] / 8**0.5)
        there = until[head, : t + 1] > t
        everything = weights @ one.v[: t + 1, head] / weights.sum()
        rest = (weights * there) @ one.v[: t + 1, head] / (weights * there).sum()
        change[t, head] += gradient[t, head, member] @ (rest - everything)
    np.testing.assert_allclose(found.blurred[place], (change[:300] ** 2).mean(0) / 2, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.again[place], change[300:].sum(0), rtol=1e-3, atol=1e-4)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**16), target=st.floats(0.2, 1))
def test_no_other_assignment_of_that_size_loses_less(seed, target):
    rng = np.random.default_rng(seed)
    live, cost = rng.random((2, 4, 1, 3))
    live[-1], cost[-1], live[0] = 1, 0, 0.1
    choice = calibrate.choose(live, cost, target)[0]
    mine = live[choice, 0, range(3)].sum(), cost[choice, 0, range(3)].sum()
    assert mine[0] <= 3 * target + 1e-9
    for other in itertools.product(range(4), repeat=3):
        if live[other, 0, range(3)].sum() <= mine[0]:
            assert cost[other, 0, range(3)].sum() >= mine[1] - 1e-9
    with pytest.raises(CormError, match="no choice keeps as little as 0.05"):
        calibrate.choose(live, cost, 0.05)


def test_from_calibration_to_use(run_main, model, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text(TEXT * 40, encoding="utf-8")
    made = "calibrate", "--model", model, "--text", text, "--tokens", 300, "--out", out, "--overwrite"
    code, printed, _ = run_main(cli.main, "corm", *made, "--target-live", 0.6)
    assert code == 0
    assert f"--policy corm:profile={out}" in printed
    profile = Profile.load(str(out))
    assert 0 < profile.made["live"] <= 0.6
    first = out.read_bytes()
    kept = "--work", tmp_path / "work"
    for _ in range(2):  # measured, and then found
        run_main(cli.main, "corm", *made, "--target-live", 0.6, *kept)
        assert out.read_bytes() == first
    (file,) = (tmp_path / "work").iterdir()
    file.write_bytes(b"")
    code, _, err = run_main(cli.main, "corm", *made, "--target-live", 0.6, *kept)
    assert (code, "delete it" in err) == (2, True), err
    spec, other = f"corm:profile={out}", tmp_path / "result.json"
    read = "compare", "--model", model, "--text", text, "--tokens", 300, "--chunk", 16, "--policy"
    assert run_main(cli.main, "corm", *read, "full", "--policy", spec, "--json", other)[0] == 0
    assert json.loads(other.read_text())["rows"][1]["kept_final"] < 1
    found = json.loads(first)
    for change, message in (
        ({"model": "another"}, "the profile is for 'another', not"),
        ({field: found[field][:1] for field in ("window", "recent", "multiple")}, "is for 1 layers of"),
        ({"window": [[0] * len(layer) for layer in found["window"]]}, "window.0.0: must be from 1 to 1073741824, or"),
        ({"multiple": [[0.5] * len(layer) for layer in found["window"]]}, "multiple.0.0: Input should be a valid int"),
        ({"group": "all"}, "group: Input should be 'any' or 'mean', not 'all'"),
        ({"recent": [layer[:1] for layer in found["recent"]]}, "for as many heads in every layer"),
        ({"sinks": "4"}, "sinks: Input should be a valid integer, not '4'"),
        ({"format": "nothing"}, "format: Input should be 'corm-jax profile 1', not 'nothing': make one with corm cal"),
    ):
        out.write_text(json.dumps(found | change))
        code, _, err = run_main(cli.main, "corm", *read, spec)
        assert (code, message in err) == (2, True), err


@pytest.fixture
def drawn(monkeypatch):
    """Costs that are not measured: which ids are read, and which of them again."""
    shape = len(calibrate.CHOICES), MODEL.config.layers, MODEL.config.kv_heads
    cost, asked = calibrate.Cost(*np.random.default_rng(0).random((3, *shape)).astype(np.float32)), []

    def measured(model, ids, seed, second, progress):
        asked.append((list(ids), list(second)))
        return cost

    monkeypatch.setattr(calibrate, "_costs", measured)
    return cost, asked


def test_what_begins_a_text_does_not_come_again(drawn, tmp_path):
    _, asked = drawn
    for begin, again in ((0, 256), (1, 256), (2, 10)):
        calibrate.costs(MODEL, {"a": IDS}, begin=begin, again=again, work=tmp_path)
        assert asked.pop() == (IDS, IDS[begin : begin + min(again, 75)])
    calibrate.costs(MODEL, {"a": IDS}, begin=1, work=tmp_path)
    assert not asked  # found
    assert len(list(tmp_path.iterdir())) == 3


def test_two_at_once_measure_the_same(drawn, tmp_path, monkeypatch):
    """One finds what the other wrote meanwhile, whole, and writes the same."""
    cost, _ = drawn
    measured, inner = calibrate._costs, []

    def slowly(*arguments):
        if not inner:
            inner.append(None)
            inner[0] = calibrate.costs(MODEL, {"a": IDS}, work=tmp_path)
        return measured(*arguments)

    monkeypatch.setattr(calibrate, "_costs", slowly)
    (outer,) = calibrate.costs(MODEL, {"a": IDS}, work=tmp_path)
    (kept,) = calibrate.costs(MODEL, {"a": IDS}, work=tmp_path)
    for found in (outer, kept, *inner[0]):
        for mine, expected in zip(found, cost, strict=True):
            np.testing.assert_array_equal(mine, expected)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"live": None},
        {"extra": np.zeros(3, np.float32)},
        {"again": np.zeros((3, 2, 2), np.float32)},
        {"again": np.zeros((101, 2, 2), np.float64)},
        {"again": np.full((101, 2, 2), np.nan, np.float32)},
    ],
)
def test_what_was_kept_of_a_text_is_checked(drawn, tmp_path, change):
    cost, _ = drawn
    calibrate.costs(MODEL, {"a": IDS}, work=tmp_path)
    (file,) = tmp_path.iterdir()
    save_file({name: values for name, values in (cost._asdict() | change).items() if values is not None}, file)
    with pytest.raises(CormError, match=f"^{file} does not hold the measurements of a text: delete it"):
        calibrate.costs(MODEL, {"a": IDS}, work=tmp_path)


def test_costs_that_cannot_be(drawn, tmp_path):
    with pytest.raises(CormError, match="cannot write .*there is no directory"):
        calibrate.costs(MODEL, {"a": IDS}, work=tmp_path / "nowhere")
    for seed in (-1, 2**32):
        with pytest.raises(CormError, match="the seed must be from 0 to 4294967295"):
            calibrate.costs(MODEL, {"a": IDS}, seed=seed)
    drawn[0].live[0] = np.inf
    with pytest.raises(CormError, match="what was measured on 'a' is NaN or infinite"):
        calibrate.costs(MODEL, {"a": IDS})


def count(least):
    return lambda value: type(value) is int and least <= value < 2**31


RIGHT = {  # by hand: what a field may hold
    **dict.fromkeys(("kv_heads", "head_dim", "chunk", "tokens"), count(1)),
    "model": lambda value: isinstance(value, str),
    "made": lambda value: value == {},
    "sinks": lambda value: count(0)(value) and value <= 2**30,
    "overflow": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "capacity": lambda value: isinstance(value, list) and value and all(map(count(1), value)),
}
WRONG = [1, 2**31, 10**30, 0, -1, 1.5, math.nan, math.inf, True, None, "x", "corm:window=", "corm:profile=gone", {}, []]
WRONG += [[[]], [[1], []], [[1, 1], [1]], [1], [[[1]]], [5, 0], [5, 2**31], [5, True], [5, None], [[1, 1], [1, 2**31]]]
TABLES = {"window": [[3, None], [7, 9]], "recent": [[1, 1], [2, 3]], "multiple": [[1, 1], [4, 1]]}


@pytest.mark.parametrize(
    ("what", "good", "load", "made"),
    [
        (
            "profile",
            {"format": "corm-jax profile 1", "model": "m", **TABLES, "sinks": 1, "group": "any", "made": {}},
            lambda path: Profile.load(str(path)),
            "corm calibrate",
        ),
        (
            "plan",
            {"format": "corm-jax plan 1", "model": "m", "policy": "tova:budget=8", "capacity": [5, 6], "overflow": 0.5}
            | {"kv_heads": 2, "head_dim": 8, "chunk": 4, "tokens": 48},
            Plan.load,
            "python -m simulator plan",
        ),
    ],
    ids=["profile", "plan"],
)
def test_a_damaged_file_is_refused(tmp_path, what, good, load, made):
    """A field at a time: one line that names the file, the field and the way out."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps(good))
    load(path)
    changes = [(name, good | {name: value}) for name in good for value in WRONG]
    changes += [(name, {key: value for key, value in good.items() if key != name}) for name in good]
    for name, bad in [*changes, ("extra", good | {"extra": 1})]:
        if name in RIGHT and name in bad and RIGHT[name](bad[name]):
            continue
        path.write_text(json.dumps(bad))
        with pytest.raises(CormError) as found:
            load(path)
        message = rf"the {what} {path} cannot be used: {name}[.:,][^\n]*: make one with {made}"
        assert re.fullmatch(message, str(found.value)), (name, bad.get(name), str(found.value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-live", "0"], "'--target-live': '0' is not a number from"),
        (["--target-live", "0.5", "--tokens", "100"], "texts of at least 256 tokens"),
        (["--target-live", "0.01"], "no choice keeps as little as 0.01"),
        (["--target-live", "0.5", "--text", "nowhere.txt"], "cannot read 'nowhere.txt'"),
    ],
)
def test_what_cannot_be(run_main, model, tmp_path, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40, encoding="utf-8")
    given_ = "--model", model, "--text", text, "--tokens", 300, "--out", tmp_path / "out.json"
    code, _, err = run_main(cli.main, "corm", "calibrate", *given_, *arguments)
    assert (code, message in err) == (2, True), err


def test_specs():
    profile = Profile(
        model="m",
        window=[[3, None], [7, 9]],
        recent=[[1, 1], [2, 3]],
        multiple=[[1, 1], [4, 1]],
        sinks=1,
        group="any",
        made={"by": "hand"},
    )
    assert profile.policy().policy.window.tolist() == [[3, EVERYTHING], [7, 9]]
    packaged = Profile.load("smollm2-135m")
    assert packaged.policy().policy.window.shape == (30, 3)
    assert repr(parse("corm:profile=smollm2-135m")) == repr(packaged.policy())
    for spec, message in (
        ("corm:profile=nowhere", "cannot read the profile nowhere"),
        ("corm:profile=", "give one profile"),
        ("corm:profile=a,window=3", "unknown option 'window=3'"),
        ("tova:profile=a", "unknown option 'profile=a'"),
    ):
        with pytest.raises(CormError, match=message):
            parse(spec)


def test_local_layers_get_rows_without_effect():
    live, blurred = np.linspace(0.1, 1, 101), np.linspace(1, 0, 101)
    cost = calibrate.Cost(*(np.tile(x[:, None, None], (1, 2, 2)).astype(np.float32) for x in (live, blurred, blurred)))
    found = calibrate.profile("m", np.array([[3, 5], [7, 100]]), cost, {}, (9, None, 5, None))
    windows = [[calibrate.CHOICES[o][0] for o in row] for row in ((100, 100), (3, 5), (100, 100), (7, 100))]
    assert found.window == windows
    assert found.made["live"] == pytest.approx(live[[3, 5, 7, 100]].mean())
    assert found.made["live_by_head"][::2] == [[1, 1], [1, 1]]
    model = tiny(layers=4, windows=(9, None, 5, None))
    found.check("m", model.config)
    local, first, _, last = policies_of(model, found.policy())
    assert local == Window(size=9)
    assert [first.policy.window.tolist(), last.policy.window.tolist()] == [windows[1], [windows[3][0], EVERYTHING]]
