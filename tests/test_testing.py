"""The conformance suite on our own policies."""

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from corm_jax import H2O, Corm, Full, Scissorhands, budget, protect
from simulator import invariants, testing
from simulator.replay import replay
from simulator.strategies import cases, hyperparameters, traces
from simulator.subject import Implementation, Subject
from simulator.testing import check_policy, parametrize_checks


def corms(**given):
    return hyperparameters(Corm, window=st.integers(1, 20), **given).map(lambda options: Corm(**options))


@parametrize_checks(
    corms(threshold="position", group="any"),
    Corm(window=np.array([3, 6], np.int32), recent=np.array([2, 1], np.int32)),
)
def test_policies(check):
    check()


@pytest.mark.slow
@parametrize_checks(corms(threshold="live", group="mean"))
def test_other_choices(check):
    check()


@pytest.mark.slow
@parametrize_checks(Full(), budget(protect(H2O(recent=np.array([2, 1])), sinks=np.array([0, 2])), 6), examples=5)
def test_further_policies(check):
    check()


def test_progress_is_printed_if_checks_take_long(monkeypatch, capsys):
    check_policy(Full(), examples=1, only="slot_order")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(testing, "EVERY", 0)
    check_policy(Full(), examples=1, only="slot_order")
    line = "check_policy: 0 of 1 checks done in 0 s, the next is slot_order\n"
    assert capsys.readouterr() == ("", line)


def test_hyperparameters_for_each_head():
    options = find(
        hyperparameters(Scissorhands, per_head=True, recent=2), lambda options: (options["budget"] > 2).all()
    )
    assert (options["budget"].tolist(), options["drop"].shape) == ([3, 3], (2,))
    assert (type(options["window"]), options["recent"]) == (int, 2)


@pytest.mark.parametrize("kind", ["qkv", "attention"])
def test_traces_are_traces(kind):
    @settings(max_examples=20)
    @given(trace=traces(kind=kind), policy=corms())
    def check(trace, policy):
        history = replay(trace, policy, errors=False).history()
        invariants.newest_live(history, policy.recent)
        invariants.none_returns(history)

    check()


def test_cases_shrink_until_they_can_be_read():
    """The simplest history in which key 0 goes under w = 2, r = 1: query 2 looks at itself, and so on."""
    policy = Corm(window=2, recent=1)
    subject = Subject(policy, Implementation(), None)
    case = find(cases(), lambda case: not subject.read(case).kept[0, 0, -1, 0])
    assert repr(case) == "Case(reads [1, 1, 1] tokens; every query attends to its own key (logit 6))"


def test_a_check_must_exist():
    with pytest.raises(ValueError, match="no check is called 'shape': there are construction, shapes, "):
        check_policy(Full(), only="shape")
