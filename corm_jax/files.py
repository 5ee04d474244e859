"""Files that appear whole or not at all."""

import json
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as found:
        raise error(f"cannot read the {what} {path}: {found.strerror}: {way_out}") from None
    except ValidationError as found:
        raise error(f"the {what} {path} cannot be used: {first_error(found)}: {way_out}") from None


def first_error(found: Any) -> str:
    """The first of the errors that a pydantic ``ValidationError`` holds: the field, what is wrong, its value."""
    first = found.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("json_invalid", "missing", "value_error") else f", not {_short(first['input'])}"
    return f"{where and where + ': '}{reason}{value}"


def _short(value: Any) -> str:
    return reprlib.repr(value)


def read_fields(path: Path, what: str, form: str, fields: dict[str, Any], command: str) -> dict[str, Any]:
    """The fields of a JSON file that one of our commands made, each of its type; ``form`` is its ``format``.

    Raises:
      CormError: for a file that cannot be read or is something else, or a field of another type.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CormError(f"cannot read the {what} {path}: {error}") from None
    if not isinstance(found, dict) or found.pop("format", None) != form or set(found) != set(fields):
        raise CormError(f"{path} is not a {what}: make one with {command}")
    for name, kind in fields.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise CormError(f"the {what} {path} says {name} = {found[name]!r}: make a new one")
    return found
