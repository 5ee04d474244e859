"""Compares caches of other packages with the rules of the papers, by `simulator.kept.check_kept`.

    python benchmarks/check_foreign.py [PACKAGE ...] [--examples 100] [--cases]

The packages are kvpress (``pip install kvpress==0.5.5``; it needs transformers below 5.3, so install it into an
environment of its own), transformers, and keys_values (a clone of awslabs/keys_values on ``PYTHONPATH``, with litgpt).
A package that is not installed is left out, with a message. ``--cases`` prints the smallest history for each
difference.

The column `finding` says why an implementation keeps other keys; docs/foreign.md explains each finding. The exit code
is 1 if an implementation without a finding differs from the rule, or if one with a finding does not.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import click
from foreign import KeysValues, Press, SlidingWindow

from simulator import rules
from simulator.kept import InvariantError, check_kept, described

PROMPT = {"ties": "any"}
DECODING = {"ties": "any", "generated": (0, 10)}


class Check(NamedTuple):
    """One implementation, and the rule that it is compared with.

    Attributes:
      function: the implementation.
      rule: see `check_kept`.
      options: see `check_kept`.
      finding: in a few words, why it keeps other keys; empty if it keeps the same.
    """

    function: Any
    rule: Any
    options: dict[str, Any]
    finding: str = ""


def budget(rule: rules.Rule, tokens: int) -> rules.Rule:
    return rules.Budget(rule, tokens=tokens, per_mille=0, least=0)


def newest(tokens: int, sinks: int = 0) -> rules.Rule:
    return budget(rules.StreamingLLM(sinks=sinks, positions="original"), tokens)


class BlindToPrompt(rules.H2O):
    """H2O as in keys_values: the attention of the prompt does not count, and the mean is over one more query."""

    def attended(self, t, head, rows):
        if t > self.prompt:
            super().attended(t, head, rows)
        else:
            self.sum |= dict.fromkeys(rows[head][0], 0.0)

    def order(self, i, t):
        return self.sum[i] if self.attention == "sum" else self.sum[i] / (t - max(i, self.prompt - 1))


def kvpress() -> Iterator[Check]:
    import kvpress as kv

    window = {"window": 2, "kernel": 3}
    snap, safe = kv.SnapKVPress(window_size=2, kernel_size=3), {**PROMPT, "prompt": (3, 14)}
    yield Check(Press(kv.StreamingLLMPress(n_sink=2), 5), newest(5, sinks=2), {"prompt": (3, 12)})
    yield Check(Press(kv.KnormPress(), 4), budget(rules.L2Norm(), 4), PROMPT)
    last = rules.Protect(rules.TOVA(), sinks=0, recent=1)
    yield Check(Press(kv.TOVAPress(), 4), budget(rules.TOVA(), 4), PROMPT, "always keeps the last token")
    yield Check(Press(kv.TOVAPress(), 4), budget(last, 4), PROMPT)
    observed = Press(kv.ObservedAttentionPress(), 4, eager=True)
    yield Check(observed, budget(rules.H2O(recent=0, attention="sum"), 4), PROMPT, "mean over queries, not their sum")
    yield Check(observed, budget(rules.H2O(recent=0, attention="mean"), 4), PROMPT)
    yield Check(Press(snap, 5), rules.SnapKV(budget=5, pool="max", **window), safe, "pools by the mean")
    yield Check(Press(snap, 5), rules.SnapKV(budget=5, pool="mean", **window), safe)
    ada = {"pool": "mean", **window}
    yield Check(Press(kv.AdaKVPress(snap, 0.0), 5), rules.AdaKV(budget=5, floor=0.0, **ada), safe)
    guarded = Press(kv.AdaKVPress(snap, 0.5), 8)
    yield Check(guarded, rules.AdaKV(budget=8, floor=0.5, **ada), safe, "the safeguard counts the window")
    pyramid = Press(kv.PyramidKVPress(window_size=2, kernel_size=3), 6, layers=3)
    rule = rules.PyramidKV(layer=0, layers=3, budget=6, **ada)
    yield Check(pyramid, rule, safe, "the pyramid counts the window")
    yield Check(_decoding(kv, kv.KnormPress(), 4), budget(rules.L2Norm(), 4), {**DECODING, "prompt": (1, 4)})
    yield Check(_decoding(kv, kv.TOVAPress(), 4), budget(last, 4), {**DECODING, "prompt": (1, 4)})
    wrong = "order in the cache is lost, and taken for the order of tokens"
    streaming = _decoding(kv, kv.StreamingLLMPress(n_sink=2), 5)
    yield Check(streaming, newest(5, sinks=2), {"generated": (0, 10), "prompt": (3, 5)}, wrong)


def _short(function: Any) -> str:
    """The implementation in text, without options that have their default values."""
    text = repr(function).replace("compression_ratio=0.0, ", "").replace("compression_ratio=0.0", "")
    return text.replace(", budget=None", "").replace(", layer=0, layers=1", "").replace(", layer=0", "")


def _decoding(kv: Any, press: Any, size: int) -> Press:
    return Press(kv.DecodingPress(press, compression_interval=1, target_size=size))


def transformers() -> Iterator[Check]:
    for window in (2, 5):
        yield Check(SlidingWindow(window), newest(window - 1), DECODING)
        yield Check(SlidingWindow(window, static=True), newest(window), DECODING)
    yield Check(SlidingWindow(1, static=True), newest(1), DECODING)
    yield Check(SlidingWindow(1), newest(1), DECODING, "a window of 1 keeps every key")


def keys_values() -> Iterator[Check]:
    options = {**DECODING, "prompt": (1, 3)}
    plain = KeysValues("h2o-default", 5)
    blind = budget(BlindToPrompt(recent=0, attention="sum"), 4)
    yield Check(
        plain, budget(rules.H2O(recent=0, attention="sum"), 4), options, "the prompt's attention does not count"
    )
    yield Check(plain, blind, options)
    yield Check(KeysValues("h2o-orig-default", 5), blind, options)
    mean = KeysValues("h2o-default", 5, {"normalize_scores": True})
    yield Check(mean, budget(BlindToPrompt(recent=0, attention="mean"), 4), options)
    grace = KeysValues("h2o-default", 5, {"grace_period": 2})
    rule = budget(BlindToPrompt(recent=2, attention="sum"), 4)
    yield Check(grace, rule, options, "in the grace period a key gets the score of another")


PACKAGES: dict[str, Callable[[], Iterator[Check]]] = {
    "kvpress": kvpress,
    "transformers": transformers,
    "keys_values": keys_values,
}


@click.command()
@click.argument("packages", nargs=-1, type=click.Choice([*PACKAGES]))
@click.option("--examples", default=100, show_default=True, type=click.IntRange(1), help="histories that are tried")
@click.option("--cases", is_flag=True, help="print the smallest history for each difference")
def main(packages, examples, cases):
    """Compare caches of other packages with the rules of the papers, as a table."""
    print("| implementation | rule | compared | evicted | close | tied | finding | |\n|" + "---|" * 8)
    surprises, shown = 0, []
    for package in packages or PACKAGES:
        if not find_spec(package):
            print(f"{package} is not installed, and is left out", file=sys.stderr)
            continue
        for check in PACKAGES[package]():
            numbers, differs = ["", "", "", ""], False
            try:
                tried = check_kept(check.function, check.rule, examples=examples, **check.options)
                numbers = [f"{n:,}" for n in (tried.cases, tried.evicted, tried.close, tried.tied)]
            except InvariantError as error:
                shown.append(str(error))
                differs = True
            expected = differs == bool(check.finding)
            surprises += not expected
            verdict = ("differs" if differs else "same keys") + ("" if expected else " (NOT EXPECTED)")
            cells = [f"`{_short(check.function)}`", f"`{described(check.rule)}`", *numbers, check.finding, verdict]
            print(f"| {' | '.join(cells)} |", flush=True)
    print(*(shown if cases else []), sep="\n\n")
    sys.exit(bool(surprises))


if __name__ == "__main__":
    main()
