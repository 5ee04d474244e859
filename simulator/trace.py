"""Traces: what a model attended to while it read one text, layer by layer, in memory or on disk.

Axis names: ``layers``; ``steps``, the queries and keys in order; ``q_heads``; ``kv_heads``, where query heads
``h * group`` to ``h * group + group - 1`` share key-value head ``h``; ``head_dim``.

>>> import tempfile
>>> rng = np.random.default_rng(0)
>>> q, k, v = (rng.normal(size=(2, 5, heads, 8)) for heads in (4, 2, 2))
>>> with tempfile.TemporaryDirectory() as folder:
...     Trace.from_qkv(q, k, v, model="noise").save(f"{folder}/noise", dtype="bfloat16")
...     trace = Trace.open(f"{folder}/noise")
...     print(trace.meta.model, trace.meta.group, trace.layer(1).k.shape, trace.part(steps=3).layer(0).q.shape)
noise 2 (5, 2, 8) (3, 4, 8)
"""

import dataclasses
import itertools
import os
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from corm_jax.errors import CormError

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_LARGEST = 2**31 - 1  # positions are int32 everywhere


class TraceError(CormError):
    """A trace that cannot be read, made or written: the message names the file, the field and what was expected."""


class QKV(NamedTuple):
    """One layer of a ``qkv`` trace, keys and queries rotated by RoPE already: ``logits = scale * q . k``.

    Attributes:
      q: float32 ``[steps, q_heads, head_dim]``.
      k, v: float32 ``[steps, kv_heads, head_dim]``.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Rows(NamedTuple):
    """One layer of an ``attention`` trace.

    Attributes:
      probs: float32 ``[q_heads, steps, steps]``. Row ``t`` is query ``t``'s (from 0): non-negative, 0 for keys after
        ``t``, its sum 1 up to rounding.
    """

    probs: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a trace holds.

    Attributes:
      kind: ``"qkv"`` or ``"attention"``.
      layers, steps, q_heads, kv_heads: at least 1; ``q_heads`` is a multiple of ``kv_heads``.
      head_dim: of a ``qkv`` trace; None otherwise.
      scale: of the logits of a ``qkv`` trace, by default ``head_dim ** -0.5``; None otherwise.
      model: its name, free text.
      dtype: what the values are rounded to where they are stored: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
      tokens, pieces: the id and the text of each token; None where unknown.
      positions: of each step, strictly increasing; by default 0 to ``steps - 1``.

    Raises:
      TraceError: for a field of the wrong type, value or length.

    >>> Meta(kind="qkv", layers=1, steps=3, q_heads=4, kv_heads=2, head_dim=16).scale
    0.25
    """

    kind: str
    layers: int
    steps: int
    q_heads: int
    kv_heads: int
    head_dim: int | None = None
    scale: float | None = None
    model: str = ""
    dtype: str = "float32"
    tokens: tuple[int, ...] | None = None
    pieces: tuple[str, ...] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        require(self.kind in ("qkv", "attention"), "kind", "'qkv' or 'attention'", self.kind)
        for name in ("layers", "steps", "q_heads", "kv_heads"):
            _whole(name, getattr(self, name), 1)
        require(self.q_heads % self.kv_heads == 0, "q_heads", f"a multiple of kv_heads={self.kv_heads}", self.q_heads)
        if self.kind == "qkv":
            head_dim = _whole("head_dim", self.head_dim, 1)
            scale = head_dim**-0.5 if self.scale is None else self.scale
            good = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale <= sys.float_info.max
            require(good, "scale", "a finite positive number", scale)
            object.__setattr__(self, "scale", float(scale))
        else:
            for name in ("head_dim", "scale"):
                require(getattr(self, name) is None, name, "None in an attention trace", getattr(self, name))
        _text("model", self.model)
        require(isinstance(self.dtype, str) and self.dtype in DTYPES, "dtype", f"one of {[*DTYPES]}", self.dtype)
        positions = tuple(range(self.steps)) if self.positions is None else self.positions
        for name, values in {"tokens": self.tokens, "pieces": self.pieces, "positions": positions}.items():
            if values is not None:
                values = values.tolist() if hasattr(values, "tolist") else values
                require(isinstance(values, list | tuple), name, "a list with one entry a step", values)
                require(len(values) == self.steps, f"len({name})", f"steps={self.steps}", len(values))
                for index, value in enumerate(values):
                    _text(f"{name}[{index}]", value) if name == "pieces" else _whole(f"{name}[{index}]", value, 0)
                object.__setattr__(self, name, tuple(values))
        rising = all(first < second for first, second in itertools.pairwise(self.positions or ()))
        require(rising, "positions", "strictly increasing", self.positions)

    @property
    def group(self) -> int:
        """How many query heads share a key-value head."""
        return self.q_heads // self.kv_heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer, by name."""
        if self.kind == "attention":
            return {"probs": (self.q_heads, self.steps, self.steps)}
        keys = (self.steps, self.kv_heads, self.head_dim or 0)
        return {"q": (self.steps, self.q_heads, self.head_dim or 0), "k": keys, "v": keys}


class Trace:
    """What a model attended to while it read one text. A layer is read when it is asked for, each time anew.

    Made by `from_qkv`, `from_attention`, `open` and `part`. Its arrays are read-only.
    """

    def __init__(self, meta: Meta, read: Callable[[int], QKV | Rows]):
        self.meta, self._read = meta, read

    def layer(self, index: int) -> QKV | Rows:
        """Layer ``index``, from 0, in float32: a `QKV` or a `Rows`, as the trace's kind is.

        Raises:
          TraceError: for an index out of range; for a file that is damaged or does not hold what ``meta`` says.
        """
        return self._read(_index("layer", index, 0, self.meta.layers - 1))

    @classmethod
    def from_qkv(cls, q, k, v, *, scale=None, model="", tokens=None, pieces=None) -> "Trace":
        """A trace of arrays in memory, copied only where they are not contiguous float32.

        Args:
          q: ``[layers, steps, q_heads, head_dim]``, rotated, of any float dtype.
          k, v: ``[layers, steps, kv_heads, head_dim]``.
          scale, model, tokens, pieces: see `Meta`.

        Raises:
          TraceError: for shapes that do not fit each other, other dtypes, NaN and infinity.
        """
        q, k, v = _array("q", q, 4), _array("k", k, 4), _array("v", v, 4)
        axes = dict(zip(("layers", "steps", "q_heads", "head_dim"), q.shape, strict=True), kv_heads=k.shape[2])
        meta = Meta(kind="qkv", scale=scale, model=model, tokens=tokens, pieces=pieces, **axes)
        return cls(meta, _layers(meta, q=q, k=k, v=v).__getitem__)

    @classmethod
    def from_attention(cls, probs, *, kv_heads=None, model="", tokens=None, pieces=None) -> "Trace":
        """A trace of attention rows in memory, copied only where they are not contiguous float32.

        Args:
          probs: ``[layers, q_heads, steps, steps]``, see `Rows`, of any float dtype. A 16-bit one becomes
            ``meta.dtype``, since it bounds how exactly rows sum to 1.
          kv_heads: by default ``q_heads``.
          model, tokens, pieces: see `Meta`.

        Raises:
          TraceError: for another shape or dtype, NaN, infinity, and rows that are no causal probabilities.
        """
        probs = _array("probs", probs, 4)
        layers, heads, steps, _ = probs.shape
        axes = {"layers": layers, "steps": steps, "q_heads": heads, "kv_heads": heads if kv_heads is None else kv_heads}
        dtype = probs.dtype.name if probs.dtype.name in DTYPES else "float32"
        meta = Meta(kind="attention", dtype=dtype, model=model, tokens=tokens, pieces=pieces, **axes)
        return cls(meta, _layers(meta, probs=probs).__getitem__)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Trace":
        """The trace in a directory: reads ``meta.json``, and looks whether the file of each layer is all there.

        Raises:
          TraceError: for anything but a whole trace.
        """
        from simulator.storage import reader

        return cls(*reader(path))

    def part(self, *, layers: Sequence[int] | None = None, steps: int | None = None) -> "Trace":
        """A view of some layers, in the order given, and of the first steps; it too reads when asked.

        Raises:
          TraceError: for layers or steps that the trace lacks, or none.
        """
        old = self.meta
        chosen = [_index("layer", i, 0, old.layers - 1) for i in (range(old.layers) if layers is None else layers)]
        stop = old.steps if steps is None else _index("steps", steps, 1, old.steps)
        cut = {name: getattr(old, name) and getattr(old, name)[:stop] for name in ("tokens", "pieces", "positions")}

        def read(index: int) -> QKV | Rows:
            layer = self._read(chosen[index])
            if isinstance(layer, Rows):
                return Rows(layer.probs[:, :stop, :stop])
            return QKV(*(array[:stop] for array in layer))

        return Trace(dataclasses.replace(old, layers=len(chosen), steps=stop, **cut), read)

    def save(self, path: str | os.PathLike, dtype: str = "float32") -> None:
        """Writes the trace to a new directory, its values rounded to ``dtype``.

        Raises:
          TraceError: where `simulator.storage.Writer` does.
        """
        from simulator.storage import Writer

        # Nothing is resumed: half a trace with the same meta may hold other values.
        with Writer(path, dataclasses.replace(self.meta, dtype=dtype), resume=False) as writer:
            for index in range(self.meta.layers):
                writer.write(**self.layer(index)._asdict())


def layer_of(where: str, meta: Meta, tensors: dict[str, Any], dtype: str = "float32") -> QKV | Rows:
    """A layer of these tensors, rounded to ``dtype``, read-only, and copied only where that changes them.

    Raises:
      TraceError: for other names, shapes and dtypes than ``meta`` has; for values that no trace holds.
    """
    shapes = meta.shapes
    require(tensors.keys() == shapes.keys(), where, " and ".join(shapes), " and ".join(tensors))
    cast = {name: _cast(f"{where}: {name}", tensors[name], shapes[name], dtype) for name in shapes}
    if meta.kind == "qkv":
        return QKV(**cast)
    for head, rows in enumerate(cast["probs"]):
        _check_rows(f"{where}: probs of head {head}", rows.astype(np.float32, copy=False), meta)
    return Rows(**cast)


def require(good: bool, name: str, expected: str, value: Any) -> None:
    """Raises a `TraceError` unless ``good``."""
    if not good:
        raise TraceError(f"{name} must be {expected}, not {reprlib.repr(value)}")


def _layers(meta: Meta, **arrays: np.ndarray) -> list[QKV | Rows]:
    for name, array in arrays.items():
        shape = (meta.layers, *meta.shapes[name])
        require(array.shape == shape, f"{name}'s shape", str(shape), array.shape)
    layers = [{name: array[index] for name, array in arrays.items()} for index in range(meta.layers)]
    return [layer_of(f"layer {index}", meta, layer) for index, layer in enumerate(layers)]


def _array(where: str, value: Any, axes: int) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{where} is no array: {error}") from None
    require(array.dtype.kind == "f" or array.dtype.name in DTYPES, f"{where}'s dtype", "a float", array.dtype.name)
    require(array.ndim == axes, f"{where}'s shape", f"of {axes} axes", array.shape)
    return array


def _cast(where: str, value: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = _array(where, value, len(shape))
    require(array.shape == shape, f"{where}'s shape", str(shape), array.shape)
    with np.errstate(all="ignore"):  # what overflows is found below
        cast = np.ascontiguousarray(array, DTYPES[dtype]).view()
    if not np.isfinite(cast).all():
        if not np.isfinite(array).all():
            raise TraceError(f"{where} contains NaN or infinity")
        wider = "bfloat16" if dtype == "float16" else "float32"
        advice = "scale it down" if dtype == "float32" else f"store it as {wider!r}"
        raise TraceError(f"{where} has values beyond {dtype}'s {ml_dtypes.finfo(DTYPES[dtype]).max}: {advice}")
    cast.flags.writeable = False
    return cast


def _check_rows(where: str, rows: np.ndarray, meta: Meta) -> None:
    if (rows < 0).any():
        raise TraceError(f"{where} must not be negative")
    if np.triu(rows, 1).any():
        raise TraceError(f"{where} must be causal: 0 for keys after the query")
    # Other frameworks' float32 rows sum to 1 within 1e-3. Rounding then moves a row's sum by half an epsilon at most,
    # which every entry may lose in the same direction, and each entry too small to be normal by half the smallest step.
    kind = ml_dtypes.finfo(DTYPES[meta.dtype])
    slack = 1e-3 + float(kind.eps) / 2 + meta.steps * float(kind.smallest_subnormal) / 2
    sums = rows.sum(-1, dtype=np.float64)
    row = int(np.abs(sums - 1).argmax())
    if abs(sums[row] - 1) > slack:
        raise TraceError(
            f"{where}, row {row}, must sum to 1 within {slack:.2g} for {meta.dtype}, not to {sums[row]:.6g}: "
            "rows that were rounded to 16 bits stay in their dtype"
        )


def _whole(name: str, value: Any, least: int, most: int = _LARGEST) -> int:
    require(type(value) is int and least <= value <= most, name, f"a whole number from {least} to {most}", value)
    return value


def _index(name: str, value: Any, least: int, most: int) -> int:
    return _whole(name, int(value) if isinstance(value, np.integer) else value, least, most)


def _text(name: str, value: Any) -> None:
    good = isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")
    require(good, name, "text without lone surrogates", value)
