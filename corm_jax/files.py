"""Files that appear whole or not at all, and results that are not lost.

One rule holds for everything that commands write: **nothing that exists is replaced, unless it is a file and the user
gives --overwrite**. Devices and pipes are written to, not replaced. `check_new` checks the rule before the work. If a
result cannot be written after the work, `deliver` keeps it elsewhere and raises an error that names the place.
"""

import errno
import json
import os
import re
import reprlib
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from corm_jax.errors import CormError

ROOM = 2**20
"""Bytes that must be free in the folder of a result before the work for it begins."""


def cache_folder() -> Path:
    """The folder of models and compiled programs: ``$XDG_CACHE_HOME/corm-jax``, by default ``~/.cache/corm-jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corm-jax"


@contextmanager
def whole_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary path whose file becomes ``path`` once the block ends without an error.

    It is beside ``path``, or, if that is a link, beside the file to which it points. A device or a pipe is written to.
    The file gets the mode of any new file there, which follows the umask, whoever writes it: safetensors and `tempfile`
    make files that nobody but their owner can read.

    Args:
      replace: False to raise an error if a file has appeared at ``path`` in the meantime.

    Raises:
      OSError: if the file cannot be written. No part of it is left then.
    """
    device, place = _is_device(path), Path(os.path.realpath(path))
    folder = Path(tempfile.gettempdir()) if device else place.parent
    temporary = folder / f".corm-{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if device:
            _pour(temporary, path)
            return
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # some file systems report only now that they are full
        if replace:
            temporary.replace(place)
        else:
            _move(temporary, place)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises unless a file can be written at ``path``, by a trial. Called before long work, not after it.

    Raises:
      CormError: for a directory, a folder in which no file can be made, or a disk with less than `ROOM` bytes free.
    """
    try:
        if path.is_dir():
            raise CormError(f"cannot write {path}: it is a directory")
        if _is_device(path):
            return
        folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
        if not folder.is_dir():
            raise CormError(f"cannot write {path}: there is no directory {folder}")
        with tempfile.TemporaryFile(dir=folder, prefix=".corm-") as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # such as a name that is too long
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        more = f": {ROOM // 2**20} MiB must be free" if full else ""
        raise CormError(f"cannot write {path}: {reason(error)}{more}") from None


def check_new(files: Mapping[str, Path | None], overwrite: bool) -> None:
    """Raises unless all files can be written under the rule of this module.

    Args:
      files: the path that each option names; None if the option is not given.
      overwrite: whether files that exist may be replaced.

    Raises:
      CormError: names the option and the file.
    """
    places: dict[str, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        try:
            check_writable(path)
        except CormError as error:
            raise CormError(f"{option}: {error}") from None
        if _is_device(path):
            continue
        if os.path.lexists(path) and not overwrite:
            raise CormError(f"{option} {path} exists already: choose another name, delete it, or add --overwrite")
        if (place := os.path.realpath(path)) in places:
            raise CormError(f"{places[place]} and {option} name the same file {path}: give each its own")
        places[place] = option


def deliver(path: Path, write: Callable[[Path], object], overwrite: bool) -> None:
    """Writes a result to ``path``; if that fails, to another folder, which the error names.

    Args:
      write: writes the result to the path that it is given. It may be called more than once.
      overwrite: whether a file that exists may be replaced.

    Raises:
      CormError: if the result is not at ``path``. The message names the place where it is.
    """
    try:
        with whole_file(path, replace=overwrite) as temporary:
            write(temporary)
        return
    except OSError as error:
        failed = f"cannot write {path}: {reason(error)}"
    for folder in (tempfile.gettempdir, Path.cwd, Path.home):
        try:
            kept = Path(tempfile.mkdtemp(prefix="corm-", dir=folder()))
        except (OSError, RuntimeError):  # the latter if there is no home directory
            continue
        try:
            write(kept / path.name)
        except OSError:
            shutil.rmtree(kept, ignore_errors=True)
            continue
        raise CormError(f"{failed}: the result is in {kept / path.name}")
    raise CormError(f"{failed}, nor anywhere else: make room, and run the command again")


def finish(*steps: Callable[[], object]) -> None:
    """Calls every step, even if others fail, so that no result is lost because another cannot be written.

    Raises:
      CormError: if steps raised it, with all their messages in one. Other errors are raised as they are.
    """
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    known = [error for error in errors if isinstance(error, CormError)]
    if unknown := [error for error in errors if not isinstance(error, CormError | OSError)]:
        raise unknown[0]
    if known:
        raise CormError("; ".join(map(str, known)))
    if errors:
        raise errors[0]


def reason(error: OSError) -> str:
    """The cause of an error, in a few words."""
    return error.strerror or str(error) or type(error).__name__


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, unless it exists.

    Raises:
      CormError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CormError(f"cannot make {path}: {reason(error)}") from None


def write_json(path: Path, result: Any) -> None:
    """Writes a result as JSON, indented."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _is_device(path: Path) -> bool:
    """Whether the path is written to, not replaced: a device, a pipe, or an open file by its number."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    found = re.fullmatch(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)", str(path))
    return found and (int(found[2]) if found[2] else ("stdout", "stderr").index(found[1]) + 1)


def _pour(source: Path, path: Path) -> None:
    number = _descriptor(path)
    if sys.stdout is not None:
        sys.stdout.flush()  # so that earlier output comes first
    with source.open("rb") as file, open(path if number is None else os.dup(number), "wb") as device:  # noqa: PTH123
        shutil.copyfileobj(file, device)


def _move(source: Path, place: Path) -> None:
    """Moves a file to a path at which there is nothing."""
    try:
        os.link(source, place)
    except FileExistsError:
        raise FileExistsError(None, "something has appeared there meanwhile") from None
    except OSError:  # a file system without links
        if os.path.lexists(place):
            raise FileExistsError(None, "something has appeared there meanwhile") from None
        source.replace(place)


Kind = TypeVar("Kind")

STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
"""Pydantic's settings for files that this package writes: no conversion, no unknown fields, no NaN."""


def read_json(
    path: Path, kind: type[Kind], what: str, way_out: str, error: Callable[[str], CormError] = CormError
) -> Kind:
    """The JSON object in a file as a ``kind``: a dataclass or a pydantic model, whose annotations are the schema.

    A dataclass sets the strictness of the schema in ``__pydantic_config__``, and checks values in ``__post_init__``,
    which may raise a `CormError`.

    Args:
      what: the role of the file, as in ``"plan"``.
      way_out: what the user can do, as in ``"make one with python -m simulator plan"``.
      error: the function that makes the error from its message.

    Raises:
      CormError: for a file that cannot be read, is not JSON or does not fit; it names the field and its value.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as found:  # a ValueError for an impossible name
        reason = getattr(found, "strerror", None) or found
        raise error(f"cannot read the {what} {path}: {reason}: {way_out}") from None
    return parse_json(content, kind, f"the {what} {path}", way_out, error)


def parse_json(
    content: bytes, kind: type[Kind], what: str, way_out: str, error: Callable[[str], CormError] = CormError
) -> Kind:
    """As `read_json`, from the content of a file or of a part of one, which ``what`` names."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(content)
    except ValidationError as found:
        raise error(f"{what} cannot be used: {first_error(found)}: {way_out}") from None


def first_error(found: Any) -> str:
    """The first error in a pydantic ``ValidationError``: the field, the mistake, the value."""
    # Another format is reported before missing fields.
    first = min(found.errors(include_url=False), key=lambda one: one["loc"] != ("format",))
    where = ".".join(map(str, first["loc"]))[:80]
    reason = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("json_invalid", "missing", "value_error") else f", not {_short(first['input'])}"
    return f"{where and where + ': '}{reason}{value}"


@lru_cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _short(value: Any) -> str:
    return reprlib.repr(value)
