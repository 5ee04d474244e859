"""A result directory: what was asked for in ``config.json``, and a line for each example in ``results.jsonl``.

Lines are written as examples finish, in an order that depends on nothing but the configuration. A run that was killed
goes on after the last whole line; a line that was cut off by that is dropped, and its example done again.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corm_jax.errors import CormError
from corm_jax.files import make_directory, write_json

CONFIG, RESULTS = "config.json", "results.jsonl"


class Records:
    """The rows of a run, on disk as soon as they are added.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> with Records(folder, {"task": "passkey"}) as records:
    ...     records.add({"policy": "full", "example": "0", "nll": 0.5})
    >>> with Records(folder, {"task": "passkey"}) as records:
    ...     ("full", "0") in records, ("full", "1") in records
    (True, False)

    Raises:
      CormError: for a directory of another configuration, one that holds something else, or damaged lines.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, config = folder, json.loads(json.dumps(config))
        _prepare(folder, config)
        self.rows = read_rows(folder / RESULTS, repair=True)
        self._done = {(row["policy"], row["example"]) for row in self.rows}
        self._file = (folder / RESULTS).open("a", encoding="utf-8")

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._done

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, and returns when it is on disk."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)
        self._done.add((row["policy"], row["example"]))


def read_config(folder: Path) -> dict[str, Any]:
    """What a run was asked for.

    Raises:
      CormError: for a directory that is no result directory.
    """
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CormError(f"{folder} is no result directory: cannot read {CONFIG}: {error}") from None


def read_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of a file, but for a last line that was cut off; that is removed from the file to ``repair`` it.

    Raises:
      CormError: for a damaged line before the last, or an example that is there twice.
    """
    if not path.exists():
        return []
    content, rows, seen = path.read_bytes(), [], set()
    whole, newline, rest = content.rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
        try:
            row = json.loads(line)
            key = row["policy"], row["example"]
        except (ValueError, TypeError, KeyError):
            raise CormError(f"{path}, line {number} is damaged: delete that line, and run again") from None
        if key in seen:
            raise CormError(
                f"{path}, line {number}: {key[1]!r} with {key[0]!r} is there twice: delete one of the lines"
            )
        seen.add(key)
        rows.append(row)
    if rest and repair:
        print(f"corm: note: {path}: the last line was cut off; its example is done again", file=sys.stderr)
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
    return rows


def _prepare(folder: Path, config: dict[str, Any]) -> None:
    if not (folder / CONFIG).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CormError(f"{folder} exists and holds something else: choose another --out")
        make_directory(folder)
        write_json(folder / CONFIG, config)
        return
    found = read_config(folder)
    if differ := [key for key in sorted(found.keys() | config.keys()) if found.get(key) != config.get(key)]:
        key = differ[0]
        raise CormError(
            f"{folder} holds results of another configuration ({_few(differ)}; {key} was {found.get(key)!r}, "
            f"not {config.get(key)!r}): choose another --out"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") + (" differs" if len(names) == 1 else " differ")
