"""The tables and figures of the study, from its results."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from corm_jax.evaluation.analysis import DISTANCES
from corm_jax.evaluation.intervals import Interval, bootstrap
from corm_jax.showing.drawing import figure_of, saving, styles
from positions import rule
from positions.measure import PASSAGE, SKIPPED, WINDOWS
from positions.models import KINDS, build

Results = dict[str, Any]
POLICIES = ("corm", "h2o", "window")
COVERED = (64, 128, 256)


def report(results: Results, figures: Path | None) -> None:
    """Prints all tables as Markdown, and draws the figures into a directory."""
    for title, table in TABLES.items():
        headings, rows = table(results)
        print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    lines = [line["seconds"] for log in results["logs"].values() for line in log]
    parts = {"training": lines, **{name: [one["seconds"] for one in results[name]] for name in ("measures", "tuned")}}
    times = ", ".join(f"{name} {sum(seconds) / 60:.1f} min" for name, seconds in parts.items())
    print(f"\n{times}, one process a core, on {', '.join({one['device'] for one in results['measures']})}")
    for name, draw in FIGURES.items() if figures else ():
        assert figures is not None
        figures.mkdir(parents=True, exist_ok=True)
        saving(draw, results)(figures / f"positions-{name}.png")
        print(f"\n{figures / f'positions-{name}.png'}")


def signed(x: Interval) -> str:
    """An interval of a difference."""
    return f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]" if np.isfinite(x.low) else f"{x.mean:+.3f} [?]"


def by_seed(results: Results, kind: str, value: Callable[[Results, int], float]) -> list[list[float]]:
    """A number of each text, for each seed of a kind."""
    found = [one for one in results["measures"] if one["kind"] == kind]
    return [[value(one, text) for text in range(len(one["text"]))] for one in found]


def over_texts(results: Results, kind: str, value: Callable[[Results, int], float]) -> Interval:
    """The mean over seeds and texts, with the interval over texts within each seed."""
    return bootstrap(*by_seed(results, kind, value))


def kinds_of(results: Results) -> list[str]:
    return [kind for kind in KINDS if any(one["kind"] == kind for one in results["measures"])]


def attention(name: str, *place: int) -> Callable[[Results, int], float]:
    """A measure of `analyse`, mean over layers and heads."""
    return lambda one, text: float(np.mean(np.array(one["attention"][text][name])[(slice(None), *place)]))


def quality(test: str, policy: str, against: str | None = None) -> Callable[[Results, int], float]:
    """The NLL through a policy's cache, or how much it exceeds that through another's."""

    def value(one: Results, text: int) -> float:
        row = one[test][text]
        return row[policy]["nll"] - (row[against]["nll"] if against else 0)

    return value


def share(test: str, policy: str) -> Callable[[Results, int], float]:
    """The share of the keys that a policy holds at the end."""
    return lambda one, text: one[test][text][policy]["kept"]


COPIES = 2.5
"""Nats a token: a model whose loss on random passages that return is lower copies them (counting gives 3.3)."""


def models(results: Results) -> tuple[list[str], Iterator[list[str]]]:
    """How well each model predicts, whether it has learned to repeat, and when."""
    noise = results["recipe"]["stages"][0][0]

    def rows():
        for name, log in results["logs"].items():
            last, minutes = log[-1], sum(line["seconds"] for line in log) / 60
            since = next((line["step"] for line in log if line["step"] <= noise and line["loss"] < COPIES), None)
            numbers = [f"{last[one]:.3f}" for one in ("text", "first", "again")]
            size = jax.eval_shape(partial(build, name.split("-")[0], results["size"], 0))
            weights = f"{sum(x.size for x in jax.tree.leaves(size)):,}"
            yield [
                name.replace("-", ", seed "),
                weights,
                f"{since:,}" if since else "never",
                *numbers,
                f"{minutes:.1f}",
            ]

    headings = ["model", "weights", "copies random tokens from step", "text", "a passage", "the same again", "minutes"]
    return headings, rows()


def sparsity(results: Results) -> tuple[list[str], Iterator[list[str]]]:
    """What attention is like."""
    distances = [1, 8, 64, 128]

    def rows():
        for kind in kinds_of(results):
            alike = [attention("similarity", DISTANCES.index(d)) for d in distances]
            covered = [attention("coverage", index) for index in range(len(COVERED))]
            yield [kind, *(f"{over_texts(results, kind, one)}" for one in (attention("sparsity"), *alike, *covered))]

    cosines = [f"cosine at {d}" for d in distances]
    return ["positions", "below 1/t", *cosines, *(f"covered by {w}" for w in COVERED)], rows()


def eviction(test: str) -> Callable[[Results], tuple[list[str], Iterator[list[str]]]]:
    """What evictions cost on a test."""

    def table(results: Results) -> tuple[list[str], Iterator[list[str]]]:
        def rows():
            for kind in kinds_of(results):
                full = over_texts(results, kind, quality(test, "full"))
                for window in WINDOWS:
                    kept = over_texts(results, kind, share(test, f"corm {window}"))
                    costs = [over_texts(results, kind, quality(test, f"{p} {window}", "full")) for p in POLICIES]
                    yield [kind, str(window), f"{full.mean:.3f}", str(kept), *map(signed, costs)]

        return ["positions", "w", "full cache", "kept", *(f"{p}: more" for p in ("CORM", "H2O", "window"))], rows()

    return table


def heads(results: Results, kinds: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of every head of these kinds: the window that it needs, and where likeness is halved; means over texts."""
    found = [one["rule"] for one in results["measures"] if kinds is None or one["kind"] in kinds]
    needed, halved = (
        np.concatenate([np.mean([text[name] for text in texts], axis=0).ravel() for texts in found])
        for name in ("needed", "halved")
    )
    return needed, halved


def rules(results: Results) -> tuple[list[str], Iterator[list[str]]]:
    """How well the rule tells the window that heads need."""

    def factor(guess: np.ndarray | float, needed: np.ndarray) -> str:
        return f"{np.exp(np.median(np.abs(np.log(guess) - np.log(needed)))):.2f}"

    def rows():
        for kind in kinds_of(results):
            needed, halved = heads(results, [kind])
            if not (others := [other for other in kinds_of(results) if other != kind]):
                continue
            others = heads(results, others)
            a, b = rule.fit(*others)
            constant = float(np.median(others[0]))
            spread = [f"{x:.0f}" for x in np.quantile(needed, [0, 0.5, 1])]
            correlation = rule.rank_correlation(needed, halved)
            by_rule, by_constant = factor(np.exp(a + b * np.log(halved)), needed), factor(constant, needed)
            yield [kind, *spread, f"{correlation:+.2f}", by_rule, by_constant]

    return ["positions", "least w", "median w", "most w", "rank correlation", "rule off by", "constant off by"], rows()


def tuned(results: Results) -> tuple[list[str], Iterator[list[str]]]:
    """Whether a model learns to live with eviction."""

    def rows():
        for one in results["tuned"]:
            corm = f"corm {one['recipe']['window']}"
            for after in ("before", "full", "corm"):
                found = one[after]
                numbers = [np.mean([t["full"]["nll"] for t in found["text"]])]
                numbers += [np.mean([t[corm]["kept"] for t in found["text"]])]
                costs = [
                    bootstrap([t[corm]["nll"] - t["full"]["nll"] for t in found[test]]) for test in ("text", "repeat")
                ]
                again = np.mean([t["full"]["nll"] for t in found["repeat"]])
                label = {"before": "before", "full": "the full cache", "corm": "CORM"}[after]
                name = f"{one['kind']}, seed {one['seed']}"
                yield [name, label, *(f"{x:.3f}" for x in numbers), signed(costs[0]), f"{again:.3f}", signed(costs[1])]

    return ["model", "tuned with", "text", "kept", "text, CORM: more", "repeat", "repeat, CORM: more"], rows()


def draw_training(results: Results, *, figure: Any = None) -> Any:
    """When induction appears."""
    figure = figure_of(figure, 9, 4)
    axes = figure.subplots()
    look = styles(KINDS)
    for name, log in results["logs"].items():
        kind, seed = name.split("-")
        steps = [line["step"] for line in log]
        line = "-" if seed == "0" else "--"
        axes.plot(steps, [one["loss"] for one in log], linestyle=line, label=f"{kind}, seed {seed}", **look[kind])
    ends = np.cumsum([stage[0] for stage in results["recipe"]["stages"]])
    for end in ends[:-1]:
        axes.axvline(end, color="0.7", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title("Training: random passages that return, then text in rows of 64 bytes, then of 512")
    axes.legend(fontsize="small", ncols=2)
    return figure


def draw_attention(results: Results, *, figure: Any = None) -> Any:
    """Likeness of queries and coverage."""
    figure = figure_of(figure, 11, 4.2)
    left, right = figure.subplots(1, 2)
    distances = [d for d in DISTANCES if d < results["size"]["context"]]
    for kind, style in styles(kinds_of(results)).items():
        for name, line in (("similarity", "-"), ("plain", ":")):
            means = [over_texts(results, kind, attention(name, index)).mean for index in range(len(distances))]
            label = kind if name == "similarity" else None
            marker = style["marker"] if name == "similarity" else ""
            left.plot(distances, means, linestyle=line, color=style["color"], marker=marker, label=label)
        found = [over_texts(results, kind, attention("coverage", index)) for index in range(len(COVERED))]
        errors = np.abs(np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T)
        right.errorbar(COVERED, [one.mean for one in found], errors, capsize=3, label=kind, **style)
    left.set_xscale("log", base=2)
    left.set_xticks(distances, [str(distance) for distance in distances])
    left.set(xlabel="distance (tokens)", ylabel="cosine of queries")
    left.set_title("Queries as they meet keys; dotted: before positions enter")
    right.set(xlabel="recent queries (w)", ylabel="share of important keys", xticks=COVERED)
    right.set_title("Found important by one of the last w queries")
    right.legend(fontsize="small")
    return figure


def draw_eviction(results: Results, *, figure: Any = None) -> Any:
    """What evictions cost, at equal memory."""
    figure = figure_of(figure, 12, 6.4)
    kinds = kinds_of(results)
    axes = figure.subplots(2, len(kinds), sharey="row", squeeze=False)
    for row, (test, name) in enumerate({"text": "text", "repeat": "repeat test"}.items()):
        for column, kind in enumerate(kinds):
            on = axes[row, column]
            for policy, style in styles(POLICIES).items():
                cost = [over_texts(results, kind, quality(test, f"{policy} {w}", "full")) for w in WINDOWS]
                kept = [over_texts(results, kind, share(test, f"{policy} {w}")).mean for w in WINDOWS]
                errors = np.abs(np.array([[one.mean - one.low, one.high - one.mean] for one in cost]).T)
                on.errorbar(kept, [one.mean for one in cost], errors, capsize=3, label=policy, **style)
            on.axhline(0, color="0.7", linewidth=0.8)
            on.set_title(kind if row == 0 else "")
            on.set_xlabel("keys kept, share" if row else "")
        axes[row, 0].set_ylabel(f"{name}: NLL beyond\nthe full cache's (nats)")
    axes[0, 0].legend(fontsize="small")
    return figure


def draw_rule(results: Results, *, figure: Any = None) -> Any:
    """The window that each head needs, against what its queries say."""
    figure = figure_of(figure, 6.5, 4.6)
    axes = figure.subplots()
    for kind, style in styles(kinds_of(results)).items():
        needed, halved = heads(results, [kind])
        axes.plot(halved, needed, linestyle="", label=kind, **style)
    a, b = rule.fit(*heads(results))
    x = np.geomspace(*np.quantile(heads(results)[1], [0, 1]), 20)
    axes.plot(x, np.exp(a + b * np.log(x)), color="0.4", linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="distance at which likeness of queries has halved (tokens)", ylabel="w that covers 95%")
    axes.set_title("Heads of all models")
    axes.legend(fontsize="small")
    return figure


TABLES: dict[str, Callable[[Results], tuple[list[str], Iterator[list[str]]]]] = {
    "The models: NLL of other texts, nats a token": models,
    "Attention: means over layers, heads, texts and seeds": sparsity,
    "Evictions, on text: NLL beyond that of the full cache": eviction("text"),
    f"Evictions, on the repeat test: the last {PASSAGE - SKIPPED} tokens": eviction("repeat"),
    "A rule for w from queries alone: heads of one kind, by a rule fitted to the others": rules,
    "Fine-tuning through a cache": tuned,
}
FIGURES = {"training": draw_training, "attention": draw_attention, "eviction": draw_eviction, "rule": draw_rule}
