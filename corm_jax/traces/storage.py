"""Traces on disk: a directory with ``meta.json``, and a safetensors file for every layer.

``meta.json`` holds the fields of `Meta`, the format's name and version, and the size and SHA-256 of each layer's file.
A directory need not be trusted: whatever bytes it holds, reading it returns arrays or raises a `TraceError`. Memory is
allocated by the size of a file, never by a number that a file states, and no link is followed.

>>> import tempfile
>>> import numpy as np
>>> meta = Meta(kind="qkv", layers=1, steps=3, q_heads=2, kv_heads=1, head_dim=4)
>>> with tempfile.TemporaryDirectory() as folder:
...     with Writer(f"{folder}/ones", meta) as writer:
...         writer.write(q=np.ones((3, 2, 4)), k=np.ones((3, 1, 4)), v=np.ones((3, 1, 4)))
...     print(sorted(file.name for file in writer.path.iterdir()))
['layer-000.safetensors', 'meta.json']
"""

import dataclasses
import hashlib
import json
import math
import os
import reprlib
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corm_jax.errors import CormError
from corm_jax.files import check_writable, whole_file
from corm_jax.traces.arrays import DTYPES, TraceError, require
from corm_jax.traces.meta import QKV, Meta, Rows, layer_of

FORMAT, VERSION = "corm-trace", 2

_META, _PART, _SCRATCH = "meta.json", "meta.part.json", "hidden.safetensors"
_LARGEST_META = 256 * 2**20
_LARGEST_HEADER = 4 * 2**10
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' spelling


class Writer:
    """Writes a trace layer by layer, into ``.{name}.part`` beside ``path``, and renames it to ``path`` at the end.

    After an error or a kill, complete layers stay on disk. A new writer with the same ``path`` and an equal ``meta``
    continues after them; with another ``meta`` it starts over.

    Args:
      path: the path of the new directory.
      meta: the description of the trace; values are rounded to ``meta.dtype``.
      resume: False to start over in any case.

    Attributes:
      done: how many layers are complete; the next `write` is layer ``done``.
      folder: the directory until then. A file ``hidden.safetensors`` in it is for the caller and removed at the end.

    Raises:
      TraceError: if ``path`` exists, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, meta: Meta, *, resume: bool = True):
        self.path, self.meta = Path(path), meta
        self.folder = _part_of(self.path)
        self._files: list[_File] = []
        with _explained(self.path):
            self._check_new()
            try:
                check_writable(self.path)
            except CormError as error:
                raise TraceError(str(error)) from None
            if resume and self._same():
                self._resume()
            else:
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self.folder.mkdir()
                _write_meta(self.folder / _PART, meta)

    @property
    def done(self) -> int:
        """How many layers are complete."""
        return len(self._files)

    def write(self, **tensors: Any) -> None:
        """Writes the next layer: ``q``, ``k`` and ``v``, or ``probs``, as in `QKV` and `Rows`, of any float dtype.

        Raises:
          TraceError: for other names or shapes; for values that a reader would refuse; if the disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        require(self.done < self.meta.layers, "layer", f"below layers={self.meta.layers}", self.done)
        layer = layer_of(f"layer {self.done}", self.done, self.meta, tensors, self.meta.dtype)
        path = self.folder / _layer_name(self.done)
        with _explained(path):
            try:
                with whole_file(path) as temporary:
                    save_file(layer._asdict(), temporary)
            except SafetensorError as error:  # this is how safetensors reports a full disk
                raise OSError(str(error)) from None
            self._files.append(_File.at(path))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            return
        if self.done < self.meta.layers:
            raise TraceError(
                f"{self.path}: {self.done} of {self.meta.layers} layers were written: run the same recording again, "
                f"which continues in {self.folder}"
            )
        with _explained(self.path):
            (self.folder / _SCRATCH).unlink(missing_ok=True)
            _write_meta(self.folder / _META, self.meta, self._files)
            self._check_new()
            self.folder.rename(self.path)
            (self.path / _PART).unlink()  # last, so that nothing is lost by a kill before

    def _check_new(self) -> None:
        if self.path.exists() or self.path.is_symlink():
            raise TraceError(f"{self.path} exists already: choose another name or delete it")

    def _same(self) -> bool:
        try:
            return _read_meta(self.folder / _PART)[0] == self.meta
        except (TraceError, OSError):
            return False

    def _resume(self) -> None:
        # A layer's file appears by a rename, so it is complete; its header shows whether it belongs to this trace.
        try:
            while self.done < self.meta.layers:
                path = self.folder / _layer_name(self.done)
                with path.open("rb") as file:
                    _check_header(path, file.read(_header_size(path, self.meta)), self.meta)
                self._files.append(_File.at(path))
        except (TraceError, OSError):
            pass
        kept = {_PART, _SCRATCH, *(file.name for file in self._files)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()


class _File(NamedTuple):
    """A layer's file as ``meta.json`` lists it."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def at(cls, path: Path) -> "_File":
        with path.open("rb") as file:
            return cls(path.name, _size(path), hashlib.file_digest(file, "sha256").hexdigest())


def reader(path: str | os.PathLike) -> tuple[Meta, Callable[[int], QKV | Rows]]:
    """The `Meta` of a directory, and the function that reads a layer.

    Raises:
      TraceError: for anything but a complete trace.
    """
    path = Path(path)
    with _explained(path):
        half = path.name.startswith(".") and path.suffix == ".part"
        if half or not (path / _META).exists():
            if half or (path / _PART).exists() or (_part_of(path) / _PART).exists():
                raise TraceError(f"{path} is half-written: run the same recording again, which completes it")
            raise TraceError(f"{path} is no trace: it is not a directory with a {_META}")
        meta, listed = _read_meta(path / _META)
        files = _check_files(path, meta, listed)
    return meta, lambda index: _read_layer(path / files[index].name, index, meta, files[index])


def _read_layer(path: Path, index: int, meta: Meta, file: _File) -> QKV | Rows:
    with _explained(path):
        begin = _header_size(path, meta)
        with path.open("rb") as whole:
            content = whole.read(file.bytes)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise TraceError(f"{path} is damaged: its sha256 is not the {file.sha256[:12]}... that {_META} states")
    _check_header(path, content[:begin], meta)
    tensors = {}
    for name, shape in sorted(meta.shapes.items()):
        tensors[name] = np.frombuffer(content, DTYPES[meta.dtype], math.prod(shape), begin).reshape(shape)
        begin += tensors[name].nbytes
    return layer_of(str(path), index, meta, tensors)


def _read_meta(path: Path) -> tuple[Meta, Any]:
    """The `Meta` in a file, and the files that it lists (None if it lists none)."""
    require(_size(path) <= _LARGEST_META, f"{path}: size", f"at most {_LARGEST_META} bytes", _size(path))
    content = _parse(path.read_bytes(), path)
    kind, version = content.pop("format", None), content.pop("version", None)
    require(kind == FORMAT, f"{path}: format", repr(FORMAT), kind)
    require(type(version) is int and version == VERSION, f"{path}: version", f"{VERSION} for this corm-jax", version)
    files = content.pop("files", None)
    names = {field.name for field in dataclasses.fields(Meta)}
    if content.keys() != names:
        raise TraceError(f"{path}: fields {reprlib.repr(sorted(content.keys() ^ names))} are missing or unknown")
    for name in ("positions", "scale") if content["kind"] == "qkv" else ("positions",):
        # Meta's defaults are for writers; default positions would allocate `steps` numbers, which is not checked yet.
        require(content[name] is not None, f"{path}: {name}", "stated", None)
    try:
        return Meta(**content), files
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None


def _write_meta(path: Path, meta: Meta, files: Sequence[_File] | None = None) -> None:
    content = {"format": FORMAT, "version": VERSION, **vars(meta)}
    if files is not None:
        content["files"] = [file._asdict() for file in files]
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _check_files(folder: Path, meta: Meta, listed: Any) -> list[_File]:
    where = f"{folder / _META}: files"
    require(isinstance(listed, list) and len(listed) == meta.layers, where, f"a list of {meta.layers}", listed)
    files = []
    for index, entry in enumerate(listed):
        at, names = f"{where}[{index}]", set(_File._fields)
        require(isinstance(entry, dict) and entry.keys() == names, at, "an object of name, bytes and sha256", entry)
        file = _File(**entry)
        require(file.name == _layer_name(index), f"{at}.name", repr(_layer_name(index)), file.name)
        path = folder / file.name
        if not path.exists() and not path.is_symlink():
            raise TraceError(f"{folder} lacks {file.name}: record or copy the trace again")
        require(type(file.bytes) is int and file.bytes == _size(path), f"{at}.bytes", str(_size(path)), file.bytes)
        require(isinstance(file.sha256, str) and len(file.sha256) == 64, f"{at}.sha256", "64 digits", file.sha256)
        _header_size(path, meta)
        files.append(file)
    return files


def _layout(meta: Meta) -> tuple[dict[str, Any], int]:
    """The header that safetensors writes for a layer, its tensors by name without gaps, and the bytes of its data."""
    layout, end = {}, 0
    for name, shape in sorted(meta.shapes.items()):
        begin, end = end, end + math.prod(shape) * DTYPES[meta.dtype].itemsize
        layout[name] = {"dtype": _NAMES[meta.dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return layout, end


def _header_size(path: Path, meta: Meta) -> int:
    size, data = _size(path), _layout(meta)[1]
    if not 8 < size - data <= _LARGEST_HEADER:
        raise TraceError(f"{path} has {size} bytes: a layer of these shapes takes {data} and a header")
    return size - data


def _check_header(path: Path, content: bytes, meta: Meta) -> None:
    length = int.from_bytes(content[:8], "little")
    require(length == len(content) - 8, f"{path}: header length", str(len(content) - 8), length)
    header = _parse(content[8:], path)
    header.pop("__metadata__", None)
    require(header == _layout(meta)[0], f"{path}: header", str(_layout(meta)[0]), header)


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field appears twice")
        return dict(pairs)

    def no_number(name):
        raise ValueError(f"{name} is no number")

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} cannot be read as JSON: {error}") from None
    require(isinstance(found, dict), str(path), "a JSON object", found)
    return found


def _size(path: Path) -> int:
    found = path.lstat()  # no link is followed out of the directory, and no file is opened that could block
    if not stat.S_ISREG(found.st_mode):
        raise TraceError(f"{path} must be a regular file, not a link or a folder")
    return found.st_size


def _layer_name(index: int) -> str:
    return f"layer-{index:03d}.safetensors"


def _part_of(path: Path) -> Path:
    return path.parent / f".{path.name}.part"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TraceError(f"{path} cannot be used: {error}") from error
