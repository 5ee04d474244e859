"""Calibration: costs against replays and loops, choices against all assignments, from making a profile to its use."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corm_jax import CormError, cli, parse
from corm_jax.profile import WHOLE, Profile
from corm_jax.recording import record
from simulator import calibrate
from simulator.replay import replay
from simulator.trace import Trace
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
    made = "calibrate", "--model", model, "--text", text, "--tokens", 300, "--out", out
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-live", "0"], "--target-live must be in (0, 1]"),
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
    assert profile.policy().policy.window.tolist() == [[3, WHOLE], [7, 9]]
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
