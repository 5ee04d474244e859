"""`check_kept` on right and wrong implementations, and on those of other packages that are installed."""

import subprocess
import sys

import numpy as np
import pytest

import corm_jax as cj
from benchmarks.foreign import SlidingWindow
from simulator import rules
from simulator.kept import InvariantError, check_kept, kept_by
from simulator.reading import read_layer
from simulator.specification import specifies

H2O = rules.Budget(rules.H2O(recent=1, attention="sum"), tokens=3, per_mille=0, least=0)
GENERATED = {"prompt": (1, 4), "generated": (0, 6)}


def h2o(queries, keys, values, prompt, slip=None):
    """H2O with a budget of 3, its newest key exempt, in vectorised NumPy; or with a slip."""
    tokens, heads, _, size = queries.shape
    live, score = np.zeros((heads, tokens), bool), np.zeros((heads, tokens))
    kept = []
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, tokens))]:
        live[:, begin:end] = True
        for t in range(begin, end):
            logits = np.einsum("hgd,khd->hgk", queries[t], keys) / size**0.5
            seen = live & (np.arange(tokens) <= (t if slip != "acausal" else end))
            weights = np.exp(np.where(seen[:, None], logits, -np.inf))
            weights /= weights.sum(-1, keepdims=True)
            score += weights[:, 0] if slip == "first of the group" else weights.mean(1)
        for head in range(heads):
            while live[head].sum() > 3:
                exempt = np.arange(tokens) == end - 1 - (slip == "off by one")
                live[head, np.where(live[head] & ~exempt, score[head], np.inf).argmin()] = False
        if slip == "heads swapped":
            live = live[::-1].copy()
        kept.append(live.copy())
    return np.stack(kept)


def test_another_implementation_of_a_rule_keeps_the_same_keys():
    tried = check_kept(h2o, H2O, **GENERATED, ties="any", examples=60)
    assert tried.cases == 60
    assert tried.evicted > 60
    assert check_kept(h2o, "h2o:recent=1,budget=3", **GENERATED, ties="any", examples=10).cases == 10
    assert check_kept(h2o, cj.parse("h2o:recent=1,budget=3"), ties="any", examples=10).cases == 10
    assert check_kept(lambda *case: h2o(*case)[-1], H2O, **GENERATED, ties="any", examples=10).cases == 10  # at the end
    assert check_kept(h2o, lambda *case: h2o(*case), **GENERATED, examples=10).tied == 0  # a function, not a rule


@pytest.mark.parametrize("slip", ["acausal", "first of the group", "off by one", "heads swapped"])
def test_a_slip_is_found(slip):
    with pytest.raises(InvariantError, match="check_kept: head [01], clock"):
        check_kept(lambda *case: h2o(*case, slip=slip), H2O, **GENERATED, ties="any", shrink=False)


@pytest.mark.parametrize("newest_first", [False, True])
def test_ties_may_be_left_out(newest_first):
    def low_norms(queries, keys, values, prompt):
        kept, age = np.ones(keys.shape[1::-1], bool), np.arange(len(keys))
        for head, row in enumerate(kept):
            worst = np.lexsort([-age if newest_first else age, -(keys[:, head] ** 2).sum(-1)])
            row[worst[: max(len(keys) - 4, 0)]] = False
        return kept

    tried = check_kept(low_norms, "l2norm:budget=4", ties="any", examples=40)
    assert (tried.cases, tried.tied > 0) == (40, True)
    if newest_first:
        with pytest.raises(InvariantError, match="is kept by .*low_norms, but evicted by the rule"):
            check_kept(low_norms, "l2norm:budget=4", shrink=False)
    else:
        assert check_kept(low_norms, "l2norm:budget=4", examples=40).tied == 0


def late(queries, keys, values, prompt):
    """The newest four, evicted one token late."""
    tokens, heads, _ = keys.shape
    clock, key = np.arange(prompt, tokens + 1)[:, None], np.arange(tokens)
    return np.repeat(((key < clock) & (key >= clock - 5))[:, None], heads, 1)


def test_a_difference_is_shown_by_the_smallest_case_and_code_that_runs():
    with pytest.raises(InvariantError) as caught:
        check_kept(late, "streaming_llm:sinks=0,budget=4", **GENERATED)
    error, words = caught.value, str(caught.value)
    assert (error.head, error.clock, error.key) == (0, 5, 0)
    assert words.startswith("check_kept: head 0, clock 5, key 0: is kept by late, but evicted by the rule\n")
    assert "'streaming_llm:sinks=0,budget=4', keeps [1, 2, 3, 4], late keeps [0, 1, 2, 3, 4]" in words
    assert "key 0: score 0, evicted; not by late" in words
    assert "key 1: score 1, kept\n" in words
    assert "np.zeros((5, 1, 1, 4), np.float32)" in words
    code = "\n".join(line.strip() for line in words.partition("to see it again:\n")[2].splitlines())
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == " [[ True  True  True  True  True]]]"


def test_what_cannot_be_compared_is_said():
    def refuses(pattern, function, rule=H2O, **options):
        with pytest.raises(InvariantError, match=pattern):
            check_kept(function, rule, **options)

    def broken(queries, keys, values, prompt):
        raise ZeroDivisionError("no tokens")

    refuses("broken raises ZeroDivisionError: no tokens\nto see it again", broken)
    refuses(
        r"must return an array of bool of the shape \(1, 1, 1\) or \(1, 1\), not of int64, \(1, 1\)", lambda *_: [[1]]
    )
    refuses(
        "the rule evicts no key in any of 100 histories", lambda q, k, v, n: np.ones(k.shape[1::-1], bool), rules.Rule()
    )
    refuses("nothing was compared: of all histories .* hang on rounding", h2o, close=2.0, prompt=(5, 8))
    answers = iter(range(10**6))
    unsure = lambda q, k, v, n: np.full(k.shape[1::-1], next(answers) % 7 > 0)  # noqa: E731
    refuses("does not answer the same history in the same way|is evicted by", unsure, "streaming_llm:budget=9")
    with pytest.raises(TypeError, match="TOVA is a class: give an object of it"):
        check_kept(h2o, rules.TOVA)
    with pytest.raises(ValueError, match="ties must be 'oldest' or 'any', not 'first'"):
        check_kept(h2o, H2O, ties="first")


def test_ties_are_told_from_scores():
    """Two of three equal keys stay: a matter of order. Of one that is better and two that go, it is not."""
    zeros = np.zeros((3, 1, 2))
    for tokens, tied in ((2, True), (3, False)):
        rule = rules.Budget(rules.L2Norm(), tokens=tokens, per_mille=0, least=0)
        read_layer([rule], zeros[:, :, None], zeros, zeros, chunks=[3])
        assert rule.tied == tied
    keys = np.array([0.0, 1, 1])[:, None, None] * np.ones(2)
    rule = rules.Budget(rules.L2Norm(), tokens=1, per_mille=0, least=0)
    read_layer([rule], zeros[:, :, None], keys, zeros, chunks=[3])
    assert not rule.tied


def test_a_rule_of_ones_own():
    @cj.policy
    class Odd(cj.Policy):
        def score(self, state, slots):
            return slots.position % 2

    with pytest.raises(cj.CormError, match="Odd has no specification: register its rule in NumPy with"):
        check_kept(late, cj.budget(Odd(), 2))

    @specifies(Odd)
    class OddRule(rules.Rule):
        def order(self, i, t):
            return i % 2

    ones = np.ones((5, 1, 2))
    assert kept_by(cj.budget(Odd(), 2), ones[:, :, None], ones, ones, 4)[:, 0].tolist() == [
        [False, True, False, True, False],
        [False, True, False, True, False],
    ]
    with pytest.raises(cj.CormError, match="Odd has a specification already: OddRule"):
        specifies(Odd)
    with pytest.raises(cj.CormError, match="specifies takes the class of a policy"):
        specifies(Odd())


def test_needs_numpy_and_hypothesis_alone():
    code = """
import sys
for name in ("jax", "corm_jax", "pytest", "torch", "flax", "click", "safetensors"):
    sys.modules[name] = None
import numpy as np
from simulator import rules
from simulator.kept import check_kept
def newest(q, k, v, prompt):
    return np.tile(np.arange(len(k)) >= len(k) - 4, (k.shape[1], 1))
rule = rules.Budget(rules.StreamingLLM(sinks=0, positions="original"), tokens=4, per_mille=0, least=0)
print(check_kept(newest, rule, examples=5).cases)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.returncode) == ("5\n", 0), ran.stderr


def test_the_suite_needs_the_extra_checks_alone():
    blocked = ["click", "torch", "transformers", "safetensors", "tokenizers", "matplotlib", "pydantic", "gguf"]
    blocked += ["rapidfuzz", "rouge_score", "huggingface_hub", "beartype", "datasets"]
    code = f"""
import sys
sys.modules |= dict.fromkeys({blocked!r})
from corm_jax import Full
from simulator.testing import check_kept, check_policy, parametrize_checks
check_policy(Full(), only="construction")
print(len(parametrize_checks(Full()).args[1]) > 15)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.returncode) == ("True\n", 0), ran.stderr


# --- implementations of other packages: benchmarks/check_foreign.py has all of them


@pytest.mark.parametrize("window", [2, 4])
def test_the_sliding_windows_of_transformers(window):
    pytest.importorskip("torch")
    options = {"generated": (0, 6), "examples": 20}
    assert check_kept(SlidingWindow(window), f"streaming_llm:sinks=0,budget={window - 1}", **options).evicted
    assert check_kept(SlidingWindow(window, static=True), f"streaming_llm:sinks=0,budget={window}", **options).evicted


def test_a_press_of_kvpress():
    kvpress = pytest.importorskip("kvpress")
    from benchmarks.foreign import Press

    rule = rules.SnapKV(budget=5, window=2, kernel=3, pool="mean")
    press = Press(kvpress.SnapKVPress(window_size=2, kernel_size=3), 5)
    assert check_kept(press, rule, prompt=(3, 12), ties="any", examples=20).evicted
