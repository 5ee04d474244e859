"""Replays as tables on a terminal, and as numbers in a report."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from corm_jax.terminal.tables import Column, print_table
from simulator.recurrence import FOREVER
from simulator.replay import Replay

COLUMNS = {
    "kept_final": ("kept", ".3f", "live / seen at the end"),
    "kept_mean": ("kept\nmean", ".3f", "live / seen, over time"),
    "kept_min": ("least\nhead", ".3f", ""),
    "kept_max": ("most\nhead", ".3f", ""),
    "mass": ("mass", ".4f", "share of the full cache's attention that fell on keys that were still held"),
    "error": ("output\nerror", ".4f", "|o - o_full| / |o_full|"),
    "regretted": ("re-\ngretted", ".4f", "share of the evicted keys that a later query would have found important"),
    "lifetime": ("life-\ntime", ",.1f", "queries that could attend to a key"),
    "overflow": ("over-\nflow", ",d", "keys that were evicted for lack of a slot, in all"),
    "seconds": ("s", ".1f", "including compilation"),
    "greedy": ("greedy", ".4f", "mass of a rule that always evicts the key to which later queries attend least"),
    "exact": ("optimum", ".4f", "the largest mass that is possible if no evicted key comes back"),
    "most": ("upper\nbound", ".4f", "mass of the best keys for each query, as many as the policy had"),
    "regret": ("regret", ".4f", "upper bound - mass"),
}
"""The columns of the tables, by their names in the report: heading, format, and the meaning if that is not plain."""


def print_replays(title: str, options: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Prints a table with a row for each replay, and all that was measured."""
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    print_rows(title, options, ["policy", *shown], rows)


def print_rows(title: str, options: dict[str, Any], columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Prints a table, and below it what its columns mean.

    Args:
      options: ``fidelity`` and ``chunk``, which hold for all rows.
      columns: names of `COLUMNS`, or other names that are in all rows.
    """
    shown, meanings = [], []
    for name in columns:
        heading, _, meaning = COLUMNS.get(name, (name, "", ""))
        shown.append(Column(heading, number=name in COLUMNS))
        if meaning:
            meanings.append(f"{shown[-1].name}: {meaning}")
    how = f"{options['fidelity']}, chunks of {options['chunk']}; means over layers and heads"
    notes = [f"{how}. {'; '.join(meanings)}."] if meanings else []
    print_table(shown, [[_cell(name, row[name]) for name in columns] for row in rows], title=title, notes=notes)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "held":
        return "yes" if value else "NO"
    return format(value, COLUMNS[column][1]) if column in COLUMNS else str(value)


def summary(result: Replay) -> dict[str, Any]:
    """A replay in numbers: means over global layers and heads, and the numbers of each head of every layer."""
    own = result.without_local()
    if own is not result:
        return summary(own) | {"per_head": summary(result._replace(about=None))["per_head"]}
    kept = result.live / np.arange(1, result.steps + 1)
    evicted, regretted = (result.until != FOREVER).sum(-1), result.regretted.sum(-1)
    per_head = {
        "kept_final": kept[..., -1],
        "kept_mean": kept.mean(-1),
        "evicted": evicted,
        "regretted": regretted,
        "lifetime": result.lifetime.mean(-1),
        "overflow": result.overflow,
        "mass": result.mass.mean(-1, dtype=np.float64),
        "error": None if result.error is None else result.error.mean(-1, dtype=np.float64),
    }
    return {
        "kept_final": float(kept[..., -1].mean()),
        "kept_mean": float(kept.mean()),
        "kept_min": float(kept[..., -1].min()),
        "kept_max": float(kept[..., -1].max()),
        "mass": float(per_head["mass"].mean()),
        "error": None if result.error is None else float(per_head["error"].mean()),
        "regretted": float(regretted.sum() / evicted.sum()) if evicted.any() else None,
        "lifetime": float(result.lifetime.mean()),
        "overflow": int(result.overflow.sum()),
        "per_head": {name: None if values is None else values.tolist() for name, values in per_head.items()},
    }
