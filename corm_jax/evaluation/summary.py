"""Summaries of rows: means over examples with their intervals, and differences from the full cache."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from corm_jax.evaluation.intervals import Interval, bootstrap
from corm_jax.evaluation.longbench import KINDS

MEASURES = {
    "score": "the task's own metric, in [0, 1]",
    "nll": "nats a token of the right answer, or of the text",
    "margin": "how much more likely the right answer is than the most likely wrong one, nats a token",
    "exact": "share of examples whose right answer the model generates by itself",
    "kl": "KL from the full cache's prediction, nats a token",
    "same": "share of tokens for which the most likely one is that of the full cache",
}
"""The measures that a row may have. The first one that it has is compared with the full cache."""


class Line(NamedTuple):
    """A policy on a task, or on all tasks of a kind.

    Attributes:
      kept: live share of the keys at the end, mean over examples.
      live, allocated, full: bytes of the cache, mean over examples.
      measures: the measures of the task, by name.
      against: paired difference of the first measure from that of another policy; None if the latter did not run.
    """

    task: str
    policy: str
    examples: int
    kept: float
    live: float
    allocated: float
    full: float
    measures: dict[str, Interval]
    against: Interval | None

    @property
    def first(self) -> str:
        """The measure that is compared with another policy's."""
        return next(iter(self.measures))


ALL = "all texts"


def lines(kind: str, rows: list[dict[str, Any]], against: str = "full") -> Iterator[Line]:
    """A line for each task and policy; then for all texts together, or for each kind of LongBench's tasks, and all.

    All texts together are one sample, whose stretches are resampled; a kind is the mean of its tasks.
    """
    if kind in ("perplexity", "agreement") and len({row["task"] for row in rows}) > 1:
        rows = [*rows, *(row | {"task": ALL} for row in rows)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    groups = {task: [task] for task in tasks}
    groups |= {f"all {one}": several for one, of in KINDS.items() if len(several := [t for t in of if t in tasks]) > 1}
    if kind == "longbench" and len(tasks) > 1:
        groups["all tasks"] = tasks
    for name, members in groups.items():
        for policy in dict.fromkeys(row["policy"] for row in rows):
            strata = [[row for row in rows if (row["task"], row["policy"]) == (task, policy)] for task in members]
            if all(strata):
                yield _line(name, policy, strata, {row["example"]: row for row in rows if row["policy"] == against})


def _line(name: str, policy: str, strata: list[list[dict[str, Any]]], other: dict[str, dict[str, Any]]) -> Line:
    mine = [row for rows in strata for row in rows]
    measures = [measure for measure in MEASURES if measure in mine[0]]
    paired = [
        [row[measures[0]] - other[row["example"]][measures[0]] for row in stratum if row["example"] in other]
        for stratum in strata
    ]

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in mine]))

    return Line(
        name,
        policy,
        len(mine),
        mean("kept"),
        mean("live_bytes"),
        mean("allocated_bytes"),
        mean("full_bytes"),
        {measure: bootstrap(*([row[measure] for row in rows] for rows in strata)) for measure in measures},
        bootstrap(*paired) if all(paired) else None,
    )
