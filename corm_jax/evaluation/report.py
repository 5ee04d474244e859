"""``corm report``: one Markdown page, with figures, from stored results alone."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from corm_jax.errors import CormError
from corm_jax.evaluation import plots
from corm_jax.evaluation.records import read_rows, read_run
from corm_jax.evaluation.rows import Run
from corm_jax.evaluation.summary import MEASURES, Line, lines
from corm_jax.files import check_new, deliver, finish
from corm_jax.policies import Corm, Notation, parse
from corm_jax.showing.drawing import saving

MIB = 2**20
SAMPLES = 2
"""The number of answers that are shown for each task."""


class Found(NamedTuple):
    """The contents of a result directory, and the lines that summarize them."""

    name: str
    run: Run
    rows: list[dict[str, Any]]
    lines: list[Line]


def report(folders: Sequence[Path], page: Path, against: str = "full", overwrite: bool = False) -> None:
    """Writes the page, and ``<page>-<kind>.png`` for each kind of run beside it.

    Args:
      against: the policy from which differences are taken, example by example.
      overwrite: whether files that exist are replaced.

    Raises:
      CormError: for a directory without results, a policy that did not run, or a file that exists.
    """
    every: list[Found] = []
    for folder in folders:
        run = read_run(folder)
        rows = read_rows(folder, run)
        if not rows:
            raise CormError(f"{folder} has no results yet: run corm eval {run.kind} first")
        every.append(Found(folder.name, run, rows, list(lines(run.kind, rows, against))))
    ran = dict.fromkeys(policy for found in every for policy in found.run.policies)
    if against not in (*ran, "full"):
        raise CormError(f"--against {against!r} is none of the policies that ran: choose from {', '.join(ran)}")
    check_new({"--out": page}, overwrite)
    pictures = {
        kind: page.with_name(f"{page.stem}-{kind}.png") for kind in dict.fromkeys(one.run.kind for one in every)
    }
    check_new({"--out": page, **{f"the picture of {kind}": picture for kind, picture in pictures.items()}}, overwrite)
    parts, draw = ["# Policies: quality and memory", ""], []
    for kind, picture in pictures.items():
        of_kind = [found for found in every if found.run.kind == kind]
        points = [line for found in of_kind for line in found.lines]
        draw.append(partial(deliver, picture, saving(plots.frontier, points, against, f"corm eval {kind}"), overwrite))
        parts += [f"## {kind}", "", f"![Quality against live memory]({picture.name})", ""]
        for found in of_kind:
            parts += [*_table(found, against), *_grid(found, against), *_samples(found)]
    words = "\n".join(parts)
    finish(lambda: deliver(page, lambda path: path.write_text(words, encoding="utf-8"), overwrite), *draw)


def _plain(words: str) -> str:
    """Words in one line, in which Markdown has no effect outside of backquotes."""
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(found: Found, against: str) -> list[str]:
    name, run = found.name, found.run
    measures = [measure for measure in MEASURES if any(measure in line.measures for line in found.lines)]
    versions = ", ".join(f"{package} {version}" for package, version in run.versions.items())
    data = ", ".join(f"{file} `{checksum}`" for file, checksum in run.data.items())
    parts = [
        _plain(f"### {name}"),
        "",
        _plain(
            f"{run.model} (`{run.weights}`), {run.dtype}, {run.device}, budget {run.budget or 'none'}, chunks of "
            f"{run.chunk}, seed {run.seed}; {versions}. Data: {data}."
        ),
        "",
        "Means over examples, with 95% bootstrap intervals. "
        + " ".join(f"`{measure}`: {MEASURES[measure]}." for measure in measures),
        "",
        f"| task | policy | examples | kept | live MiB | allocated MiB | full MiB | {' | '.join(measures)} "
        f"| {measures[0]} - {against} |",
        "|---" * (8 + len(measures)) + "|",
    ]
    for line in found.lines:
        sizes = f"{line.kept:.3f} | {line.live / MIB:.1f} | {line.allocated / MIB:.1f} | {line.full / MIB:.1f}"
        cells = " | ".join(str(line.measures.get(measure, "")) for measure in measures)
        what = f"{_plain(line.task)} | `{_plain(line.policy)}` | {line.examples}"
        parts.append(f"| {what} | {sizes} | {cells} | {line.against or ''} |")
    return [*parts, ""]


def _grid(found: Found, against: str) -> list[str]:
    """The first measure by w and r, for runs of CORM over a grid."""
    parts: list[str] = []
    for task in dict.fromkeys(line.task for line in found.lines):
        cells = {}
        for line in found.lines:
            with suppress(CormError):  # the profile of a policy may have been deleted
                policy = Notation.read(line.policy).name == "corm" and parse(line.policy)
                if line.task == task and isinstance(policy, Corm):
                    cells[policy.window, policy.recent] = line
        windows, recents = (sorted({key[axis] for key in cells}) for axis in (0, 1))
        if len(windows) < 2 or len(recents) < 2:
            continue
        what = f"minus that of {against} " if any(line.against for line in cells.values()) else ""
        measure = next(iter(cells.values())).first
        parts += [f"{_plain(task)}, {measure} {what}by w (down) and r (across); kept in brackets:", ""]
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


def _samples(found: Found) -> list[str]:
    """The first answers of each task, policy by policy."""
    rows = [row for row in found.rows if "answer" in row]
    parts: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for example in list(dict.fromkeys(row["example"] for row in rows if row["task"] == task))[:SAMPLES]:
            parts += [f"`{_plain(example)}`:", "", "| policy | answer |", "|---|---|"]
            for row in rows:
                if row["example"] == example:
                    words = " ".join(row["answer"].split())[:200]
                    parts.append(f"| `{_plain(row['policy'])}` | {_plain(words)} |")
            parts.append("")
    return ["Answers side by side:", "", *parts] if parts else []
