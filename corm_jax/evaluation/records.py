"""A result directory: the configuration in ``config.json``, and a line for each example in ``results.jsonl``.

Lines are written as examples finish, in an order that depends on the configuration alone. A run that was killed is
continued after the last complete line; a line that was cut off is dropped, and its example is done again. Only one
process at a time writes.
"""

import errno
import json
import os
import reprlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from corm_jax.errors import CormError
from corm_jax.evaluation.lock import only_writer
from corm_jax.evaluation.rows import ROWS, Run
from corm_jax.files import make_directory, parse_json, read_json, write_json

CONFIG, RESULTS, LOCK = "config.json", "results.jsonl", ".lock"


class Records:
    """The rows of a run, on disk as soon as they are added.

    >>> import tempfile
    >>> from corm_jax.evaluation.rows import FORMAT
    >>> texts = dict.fromkeys(("model", "dtype", "prompts", "device", "weights"), "")
    >>> numbers = {"chunk": 1, "seed": 0, "budget": None, "limit": None, "policies": ["full"], "begin": []}
    >>> places = dict.fromkeys(("settings", "versions", "data"), {})
    >>> run = Run(format=FORMAT, kind="longbench", **texts, **numbers, **places)
    >>> row = {"policy": "full", "example": "0", "task": "qasper", "ran": "full", "score": 0.5, "answer": "it"}
    >>> row |= {"kept": 1.0, "live_bytes": 1, "allocated_bytes": 1, "full_bytes": 1, "overflow": 0}
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> with Records(folder, run) as records:
    ...     records.add(row)
    >>> with Records(folder, run) as records:
    ...     ("full", "0") in records, ("full", "1") in records
    (True, False)

    Raises:
      CormError: when the block is entered, for a directory that another process writes to, that has another
        configuration or that holds something else, or for damaged lines.
    """

    rows: list[dict[str, Any]]

    def __init__(self, folder: Path, run: Run):
        self.folder, self.run = folder, run

    def __enter__(self) -> "Records":
        check_free(self.folder)
        make_directory(self.folder)
        with ExitStack() as stack:
            stack.enter_context(_lock(self.folder))
            _configure(self.folder, self.run)
            self.rows = read_rows(self.folder, self.run, repair=True)
            self._done = {(row["policy"], row["example"]) for row in self.rows}
            try:
                self._file = stack.enter_context((self.folder / RESULTS).open("ab", buffering=0))
            except OSError as error:
                raise CormError(f"cannot write {self.folder / RESULTS}: {error.strerror}") from None
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._done

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, and returns when it is on disk.

        Raises:
          CormError: for a row that could not be read again, such as one with NaN, or if it cannot be written.
        """
        line = json.dumps(row, ensure_ascii=False).encode("utf-8")
        what = f"{row['example']!r} with {row['policy']!r}"
        parse_json(line, ROWS[self.run.kind], f"the result of {what}", "are the weights sound in this dtype?")
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line + b"\n") <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            raise CormError(
                f"cannot write {self.folder / RESULTS}: {error.strerror}: {len(self.rows):,} results are there; make "
                "room, and run the same command again to continue"
            ) from None
        self.rows.append(row)
        self._done.add((row["policy"], row["example"]))


def check_free(folder: Path) -> None:
    """Raises if results cannot be written to a directory. Called before long work, not after it.

    Raises:
      CormError: for a directory that cannot be made or written to, one that holds something else, or one that another
        process writes to.
    """
    try:
        place = next(place for place in (folder, *folder.parents) if place.exists())
        ours = (folder / CONFIG).exists()
        others = [path.name for path in folder.iterdir()] if place == folder and not ours else []
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise CormError(f"cannot use {folder}: {place} is not a directory to write to: choose another --out")
    except OSError as error:  # such as a name that is too long, or a file
        raise CormError(f"cannot use {folder}: {error.strerror}: choose another --out") from None
    # A kill may leave a lock and a part of a configuration.
    if any(name != LOCK and not (name.startswith(".") and name.endswith(".part")) for name in others):
        raise CormError(f"{folder} exists and holds something else: choose another --out")
    if ours:
        read_run(folder)
    if (folder / LOCK).exists():
        with _lock(folder):
            pass


def read_run(folder: Path) -> Run:
    """The configuration of a run.

    Raises:
      CormError: for a directory that is not a result directory, or one of another version.
    """
    way_out = f"{folder} is no result directory of corm eval, or that of another version: make a new one"
    return read_json(folder / CONFIG, Run, "configuration", way_out)


def read_rows(folder: Path, run: Run, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of a run without a last line that was cut off, which ``repair`` removes from the file.

    Raises:
      CormError: for a damaged line before the last, one that does not belong to the run, or an example that occurs
        twice.
    """
    path, rows, seen = folder / RESULTS, [], set()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CormError(f"cannot read {path}: {error.strerror}") from None
    whole, newline, rest = content.rpartition(b"\n")
    way_out = "delete that line, and run the same command again"
    for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
        what = f"{path}, line {number},"
        row = asdict(parse_json(line, ROWS[run.kind], what, way_out))
        key = row["policy"], row["example"]
        if row["policy"] not in run.policies:
            raise CormError(f"{what} has the policy {reprlib.repr(row['policy'])}, which is not in the run: {way_out}")
        if key in seen:
            raise CormError(f"{what} has {key[1]!r} with {key[0]!r} for a second time: {way_out}")
        seen.add(key)
        rows.append({name: value for name, value in row.items() if value is not None})
    if rest and repair:
        print(f"corm: note: {path}: the last line was cut off; its example is done again", file=sys.stderr)
        try:
            os.truncate(path, len(content) - len(rest))
        except OSError as error:
            raise CormError(f"cannot write {path}: {error.strerror}") from None
    return rows


def _lock(folder: Path):
    return only_writer(folder / LOCK, str(folder), "choose another --out")


def _configure(folder: Path, run: Run) -> None:
    """Writes the configuration, or raises if there is a different one."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
    if not (folder / CONFIG).exists():
        write_json(folder / CONFIG, asdict(run))
        return
    found, wanted = read_run(folder).flat(), json.loads(json.dumps(run.flat()))
    if differ := [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]:
        key = differ[0]
        was, now = (reprlib.repr(one.get(key)) for one in (found, wanted))
        raise CormError(
            f"{folder} holds results of another configuration ({_few(differ)}; {key} was {was}, not {now}): choose "
            "another --out"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") + (" differs" if len(names) == 1 else " differ")
