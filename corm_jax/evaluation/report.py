"""``corm report``: one Markdown page, with figures, from nothing but stored results."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corm_jax import plots
from corm_jax.errors import CormError
from corm_jax.evaluation.records import RESULTS, read_config, read_rows
from corm_jax.evaluation.summary import MEASURES, Line, lines
from corm_jax.files import check_new, deliver, finish
from corm_jax.policies import Corm, parse

MIB = 2**20
SAMPLES = 2
"""Answers of each task that are shown."""

Run = tuple[str, dict[str, Any], list[dict[str, Any]], list[Line]]


def report(folders: Sequence[Path], page: Path, against: str = "full", overwrite: bool = False) -> None:
    """Writes the page, and ``<page>-<kind>.png`` for each kind of run beside it.

    Args:
      against: the policy from which differences are taken, example by example.
      overwrite: whether files that exist are replaced.

    Raises:
      CormError: for a directory without results, or a file that exists.
    """
    runs: list[Run] = []
    for folder in folders:
        config, rows = read_config(folder), read_rows(folder / RESULTS)
        if not rows:
            raise CormError(f"{folder} has no results yet: run corm eval {config.get('kind', '')} first")
        runs.append((folder.name, config, rows, list(lines(config["kind"], rows, against))))
    check_new({"--out": page}, overwrite)
    kinds = dict.fromkeys(config["kind"] for _, config, _, _ in runs)
    pictures = {kind: page.with_name(f"{page.stem}-{kind}.png") for kind in kinds}
    check_new({"--out": page, **{f"the picture of {kind}": picture for kind, picture in pictures.items()}}, overwrite)
    parts, draw = ["# How policies do", ""], []
    for kind, picture in pictures.items():
        of_kind = [run for run in runs if run[1]["kind"] == kind]
        every = [line for run in of_kind for line in run[3]]
        draw.append(partial(deliver, picture, partial(plots.frontier, every, against=against), overwrite))
        parts += [f"## {kind}", "", f"![Quality against live memory]({picture.name})", ""]
        for run in of_kind:
            parts += [*_table(run, against), *_grid(run, against), *_samples(run)]
    words = "\n".join(parts)
    finish(lambda: deliver(page, lambda path: path.write_text(words, encoding="utf-8"), overwrite), *draw)


def _table(run: Run, against: str) -> list[str]:
    name, config, _, found = run
    measures = [measure for measure in MEASURES if any(measure in line.measures for line in found)]
    versions = ", ".join(f"{package} {version}" for package, version in config["versions"].items())
    data = ", ".join(f"{file} `{checksum}`" for file, checksum in config["data"].items())
    parts = [
        f"### {name}",
        "",
        f"{config['model']} (`{config['weights']}`), {config['dtype']}, {config['device']}, budget "
        f"{config['budget'] or 'none'}, chunks of {config['chunk']}, seed {config['seed']}; {versions}. Data: {data}.",
        "",
        "Means over examples, with 95% bootstrap intervals. "
        + " ".join(f"`{measure}`: {MEASURES[measure]}." for measure in measures),
        "",
        f"| task | policy | examples | kept | live MiB | allocated MiB | full MiB | {' | '.join(measures)} "
        f"| {measures[0]} - {against} |",
        "|---" * (8 + len(measures)) + "|",
    ]
    for line in found:
        sizes = f"{line.kept:.3f} | {line.live / MIB:.1f} | {line.allocated / MIB:.1f} | {line.full / MIB:.1f}"
        cells = " | ".join(str(line.measures.get(measure, "")) for measure in measures)
        parts.append(f"| {line.task} | `{line.policy}` | {line.examples} | {sizes} | {cells} | {line.against or ''} |")
    return [*parts, ""]


def _grid(run: Run, against: str) -> list[str]:
    """The first measure by w and r, for runs of CORM over a grid."""
    parts: list[str] = []
    for task in dict.fromkeys(line.task for line in run[3]):
        cells = {}
        for line in run[3]:
            policy = parse(line.policy)
            if line.task == task and isinstance(policy, Corm):
                cells[policy.window, policy.recent] = line
        windows, recents = (sorted({key[axis] for key in cells}) for axis in (0, 1))
        if len(windows) < 2 or len(recents) < 2:
            continue
        what = f"minus that of {against} " if any(line.against for line in cells.values()) else ""
        parts += [f"{task}, {next(iter(cells.values())).first} {what}by w (down) and r (across); kept in brackets:", ""]
        parts += [
            "| w | " + " | ".join(f"r = {recent}" for recent in recents) + " |",
            "|---" * (1 + len(recents)) + "|",
        ]
        for window in windows:
            row = [cells.get((window, recent)) for recent in recents]
            values = [x and (x.against or next(iter(x.measures.values()))) for x in row]
            shown = [f"{v.mean:.3f} ({x.kept:.3f})" if x and v else "" for x, v in zip(row, values, strict=True)]
            parts.append(f"| {window} | " + " | ".join(shown) + " |")
        parts.append("")
    return parts


def _samples(run: Run) -> list[str]:
    """The first answers of each task, policy by policy."""
    rows = [row for row in run[2] if "answer" in row]
    parts: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for example in list(dict.fromkeys(row["example"] for row in rows if row["task"] == task))[:SAMPLES]:
            parts += [f"`{example}`:", "", "| policy | answer |", "|---|---|"]
            for row in rows:
                if row["example"] == example:
                    words = " ".join(row["answer"].split()).replace("|", "\\|")
                    parts.append(f"| `{row['policy']}` | {words[:200]} |")
            parts.append("")
    return ["Answers side by side:", "", *parts] if parts else []
