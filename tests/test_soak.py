"""The soak: it covers every policy and choice, finds what is broken, counts honestly, and goes on where it stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from corm_jax import H2O, POLICIES, Corm
from simulator import cli, soak
from simulator.soak import BATCH, VARIANTS, Tally, case


@pytest.fixture
def sabotage(monkeypatch):
    """Replaces a member for a while; compiled programs would still hold the old one."""

    def replace(owner, name, value):
        monkeypatch.setattr(owner, name, value)
        jax.clear_caches()

    yield replace
    jax.clear_caches()


@pytest.fixture
def simulator(run_main):
    return lambda *arguments: run_main(cli.main, "simulator", *arguments)


def batch_of(name, which=0):
    """Where the batch begins in which a policy is tried for the first time, or for the second."""
    return BATCH * [index for index, variant in enumerate(VARIANTS) if variant.name == name][which]


def test_every_policy_with_every_choice_is_tried():
    assert {variant.name for variant in VARIANTS[: len(POLICIES)]} == POLICIES.keys()
    for name, kind in POLICIES.items():
        tried = [variant for variant in VARIANTS if variant.name == name]
        for field in dataclasses.fields(kind):
            if field.metadata.get("choices") and (name, field.name) != (
                "streaming_llm",
                "positions",
            ):  # no rotation here
                assert {variant.choices[field.name] for variant in tried} == set(field.metadata["choices"])
    assert {variant.wrapped for variant in VARIANTS} == {"", "budget", "oneshot"}
    turns = [case(0, BATCH * (which + turn * len(VARIANTS))) for turn in range(9) for which in range(2)]
    assert (
        len({(one.stores, one.chunk) for one in turns[::2]})
        == len({(one.stores, one.chunk) for one in turns[1::2]})
        == 9
    )


@pytest.mark.parametrize(
    "start",
    [
        batch_of("corm"),
        batch_of("snapkv"),
        *(pytest.param(batch_of(*name), marks=pytest.mark.slow) for name in (["h2o"], ["scissorhands", 1])),
        BATCH * (len(VARIANTS) + 2),
    ],
)
def test_a_small_soak_finds_nothing(start):
    (tally,) = soak.soak(seed=1, start=start, cases=BATCH)
    assert tally.differences == ()
    assert tally.cases + tally.left_out == BATCH
    assert tally.left_out <= 4
    assert tally.decisions > 50 * tally.cases
    assert tally.evicted > 0


def test_decisions_are_counted_one_by_one():
    start = batch_of("h2o")
    (tally,) = soak.soak(start=start, cases=4)
    decisions = evicted = left = 0
    for index in range(start, start + 4):
        one, expected = case(0, index), soak._specified(case(0, index))
        for reading in expected:
            before, first = set(), 0
            for count, after in zip(one.counts[one.counts > 0], reading.kept, strict=True):
                judged = before | set(range(first, first + count))
                decisions, evicted = decisions + len(judged), evicted + len(judged - after)
                before, first = after, first + count
        left += sum(reading.overflow for reading in expected)
    assert tally.left_out == 0
    assert (tally.decisions, tally.evicted + tally.lost, tally.lost) == (decisions, evicted, left)


def test_a_soak_goes_on_where_it_stopped():
    start = batch_of("streaming_llm")
    (whole,) = soak.soak(seed=3, start=start, cases=6)
    (first,) = soak.soak(seed=3, start=start, cases=4)
    (rest,) = soak.soak(seed=3, start=first.index, cases=2)
    assert rest.index == whole.index == start + 6
    assert soak.summary([whole]) == soak.summary([first, rest])
    one, same, other = case(3, start), case(3, start), case(4, start)
    assert str(one) == str(same) != str(other)
    np.testing.assert_array_equal(one.q, same.q)


def test_a_broken_policy_is_found_and_each_case_alone_shows_it(sabotage, simulator):
    retain, start = Corm.retain, batch_of("corm")

    def one_too_few(self, state, slots):
        return retain(dataclasses.replace(self, recent=self.recent - 1), state, slots)

    sabotage(Corm, "retain", one_too_few)
    (tally,) = soak.soak(start=start, cases=BATCH)
    assert tally.differences
    for line in tally.differences[:2]:
        assert "but not in the specification" in line
        index = int(line.split()[1].rstrip(","))
        (alone,) = soak.soak(start=index, cases=1)
        assert alone.differences == (line,)
    code, out, _ = simulator("soak", "--start", index, "--cases", 1)
    assert code == 1
    assert f"case {index}, Corm(window=" in out
    assert f"; to repeat it: --seed 0 --start {index} --cases 1\n" in out


def test_a_broken_replay_is_found(sabotage):
    start, replay = batch_of("pyramidkv"), soak.replay
    assert case(0, start).chunk
    sabotage(soak, "replay", lambda *given, prompt, **options: replay(*given, prompt=max(prompt - 1, 1), **options))
    (tally,) = soak.soak(start=start, cases=BATCH)
    assert tally.differences
    assert all(": replay: head " in line for line in tally.differences)


def test_errors_are_differences(sabotage):
    def fails(self, state, slots):
        raise RuntimeError("lost\nits way")

    sabotage(H2O, "score", fails)
    (tally,) = soak.soak(start=batch_of("h2o"), cases=2)
    assert [line.partition(" slots a head: ")[2] for line in tally.differences] == [
        "cache: RuntimeError: lost its way"
    ] * 2
    sabotage(soak, "readings", lambda *given, **options: 1 / 0)
    (tally,) = soak.soak(start=batch_of("full"), cases=1)
    assert tally.differences[0].endswith("the specification: ZeroDivisionError: division by zero")
    assert (tally.cases, tally.decisions) == (1, 0)


FOUND = [
    Tally("corm", 16, 15, 30_000, 1_000, 10, 1, ()),
    Tally("h2o", 32, 16, 20_000, 900, 20, 0, tuple(f"case {i}, H2O(...): cache: head 1" for i in range(16, 32))),
    Tally("corm", 48, 16, 40_000, 800, 30, 0, tuple(f"case {i}, Corm(...): cache: head 1" for i in range(32, 48))),
]


def test_command(simulator, monkeypatch, tmp_path):
    def stand_in(seed, start, cases):
        assert (seed, start, cases) == (7, 5, None)
        yield from FOUND
        raise KeyboardInterrupt

    monkeypatch.setattr(soak, "soak", stand_in)
    report = tmp_path / "soak.json"
    common = ("soak", "--seed", 7, "--start", 5, "--json", report, "--overwrite", "--decisions")
    code, out, _ = simulator(*common, "3e4")
    result = json.loads(report.read_text())
    assert (code, result["next"], [row["policy"] for row in result["rows"]]) == (0, 16, ["corm", "all"])
    assert "to go on: --seed 7 --start 16\n" in out
    code, out, _ = simulator(*common, 90_000)
    result = json.loads(report.read_text())
    corm = {"policy": "corm", "cases": 31, "decisions": 70_000, "evicted": 1_800, "lost": 40, "left_out": 1}
    assert (code, result["rows"][0], result["rows"][-1]["decisions"]) == (1, corm | {"differences": 16}, 90_000)
    assert len(result["differences"]) == 32
    assert out.count("; to repeat it: --seed 7 --start ") == cli.DIFFERENCES
    assert "and 12 more" in out
    code, out, err = simulator(*common, "inf")
    assert (code, "70,000" in out, "to go on: --seed 7 --start 48\n" in out) == (130, True, True)
    assert err.strip() == "simulator: interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decisions", "nan"), "'--decisions': 'nan' is not a number from 1 to inf"),
        (("--decisions", "0"), "'--decisions': '0' is not a number from 1 to inf"),
        (("--decisions", "many"), "'--decisions': 'many' is not a number from 1 to inf"),
        (("--cases", "0"), "'--cases': '0' is not a whole number from 1"),
        (("--start", "-1"), "'--start': '-1' is not a whole number from 0"),
        (("--json", "nowhere/soak.json"), "there is no directory nowhere"),
    ],
)
def test_mistakes(simulator, arguments, message):
    code, out, err = simulator("soak", *arguments)
    assert (code, out, message in err) == (2, "", True)
