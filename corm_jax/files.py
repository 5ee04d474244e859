"""Files that appear whole or not at all."""

import json
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from corm_jax.errors import CormError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it once the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises unless a file can be put at ``path``: asked before long work, not after."""
    try:
        if path.is_dir():
            raise CormError(f"cannot write {path}: it is a directory")
        if not path.parent.is_dir():
            raise CormError(f"cannot write {path}: there is no directory {path.parent}")
    except OSError as error:  # such as a name that is too long
        raise CormError(f"cannot write {path}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise CormError(f"cannot write {path}: no permission in {path.parent}")


def make_directory(path: Path) -> None:
    """Makes a directory, with those above it, unless it is there already.

    Raises:
      CormError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CormError(f"cannot make {path}: {error.strerror}") from None


def write_json(path: Path, result: Any) -> None:
    """Writes a result for people and programs to read."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


Kind = TypeVar("Kind")

STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
"""How pydantic reads the files that this package writes: nothing is converted, nothing is unknown, nothing is NaN."""


def read_json(
    path: Path, kind: type[Kind], what: str, way_out: str, error: Callable[[str], CormError] = CormError
) -> Kind:
    """The JSON object in a file as a ``kind``: a dataclass or a pydantic model, whose annotations are the schema.

    A dataclass says in ``__pydantic_config__`` how strict the schema is, and checks values in ``__post_init__``, which
    may raise a `CormError`.

    Args:
      what: the file's role, as in ``"plan"``.
      way_out: what the user can do, as in ``"make one with python -m simulator plan"``.
      error: makes the error from its message.

    Raises:
      CormError: for a file that cannot be read, is no JSON or does not fit; it names the field and its value.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as found:  # a ValueError for a name that cannot be one
        reason = getattr(found, "strerror", None) or found
        raise error(f"cannot read the {what} {path}: {reason}: {way_out}") from None
    return parse_json(content, kind, f"the {what} {path}", way_out, error)


def parse_json(
    content: bytes, kind: type[Kind], what: str, way_out: str, error: Callable[[str], CormError] = CormError
) -> Kind:
    """What `read_json` makes of the content of a file, or of a part of one; ``what`` says which."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(content)
    except ValidationError as found:
        # A file of another format says so before it says which fields it lacks.
        first = min(found.errors(include_url=False), key=lambda one: one["loc"] != ("format",))
        where = ".".join(map(str, first["loc"]))[:80]
        reason = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] in ("json_invalid", "missing", "value_error") else f", not {_short(first['input'])}"
        raise error(f"{what} cannot be used: {where and where + ': '}{reason}{value}: {way_out}") from None


@lru_cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _short(value: Any) -> str:
    return reprlib.repr(value)
