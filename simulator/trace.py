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
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from simulator.arrays import DTYPES, TraceError, by_layer, floats, require

_LARGEST = 2**31 - 1  # positions are int32 everywhere


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
    tokens: tuple[int, ...] | None = field(default=None, repr=False)
    pieces: tuple[str, ...] | None = field(default=None, repr=False)
    positions: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self):
        require(self.kind in ("qkv", "attention"), "kind", "'qkv' or 'attention'", self.kind)
        for name in ("layers", "steps", "q_heads", "kv_heads"):
            object.__setattr__(self, name, _whole(name, getattr(self, name), 1))
        require(self.q_heads % self.kv_heads == 0, "q_heads", f"a multiple of kv_heads={self.kv_heads}", self.q_heads)
        if self.kind == "qkv":
            object.__setattr__(self, "head_dim", _whole("head_dim", self.head_dim, 1))
            scale: Any = (self.head_dim or 1) ** -0.5 if self.scale is None else self.scale
            scale = scale.item() if getattr(scale, "ndim", None) == 0 else scale
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
                check = _text if name == "pieces" else partial(_whole, least=0)
                checked = tuple(check(f"{name}[{index}]", value) for index, value in enumerate(values))
                object.__setattr__(self, name, checked)
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

    def __repr__(self) -> str:
        names = ("kind", "model", "layers", "steps", "q_heads", "kv_heads", "head_dim")
        shown = {name: getattr(self.meta, name) for name in names}
        shown = {name: value for name, value in shown.items() if value not in (None, "")}
        return f"Trace({', '.join(f'{name}={reprlib.repr(value)}' for name, value in shown.items())})"

    def layer(self, index: int) -> QKV | Rows:
        """Layer ``index``, from 0, in float32: a `QKV` or a `Rows`, as the trace's kind is.

        Raises:
          TraceError: for an index out of range; for a file that is damaged or does not hold what ``meta`` says.
        """
        return self._read(_whole("layer", index, 0, self.meta.layers - 1))

    @classmethod
    def from_qkv(cls, q, k, v, *, heads_first=None, scale=None, model="", tokens=None, pieces=None) -> "Trace":
        """A trace of arrays in memory, copied only where they are not contiguous float32 of NumPy.

        Arrays may be NumPy's, JAX's or torch's, on any device, of any float dtype. Each is one array for all layers, or
        a list or tuple of one array a layer, which may have a batch axis of 1 in front. For a whole model of
        `transformers` see `simulator.huggingface.record`.

        Args:
          q: ``[layers, steps, q_heads, head_dim]``, rotated.
          k, v: ``[layers, steps, kv_heads, head_dim]``.
          heads_first: True if the heads come before the steps, as in torch's and transformers'
            ``[1, heads, steps, head_dim]``. Has to be said where there is a batch axis, since either order is in use.
          scale, model, tokens, pieces: see `Meta`.

        Raises:
          TraceError: for shapes that do not fit each other, other dtypes, batches of several texts, NaN and infinity.
        """
        given, arrays = {"q": q, "k": k, "v": v}, {}
        for name, value in given.items():
            layers, batched = by_layer(name, value, 3)
            if batched and heads_first is None:
                raise TraceError(
                    f"{name} has a batch axis, {layers[0][None].shape}: say heads_first=True if that is "
                    "[1, heads, steps, head_dim], as in transformers, or heads_first=False if steps come before heads"
                )
            arrays[name] = [layer.swapaxes(0, 1) for layer in layers] if heads_first else layers
        steps, q_heads, head_dim = arrays["q"][0].shape
        axes = {"layers": len(arrays["q"]), "steps": steps, "q_heads": q_heads, "head_dim": head_dim}
        hint = f"of {steps} steps, as q's (heads_first=True if heads come before steps)"
        require(len(arrays["k"][0]) == steps, "k's shape", hint, arrays["k"][0].shape)
        axes["kv_heads"] = arrays["k"][0].shape[1]
        meta = Meta(kind="qkv", scale=scale, model=model, tokens=tokens, pieces=pieces, **axes)
        return cls(meta, _layers(meta, **arrays).__getitem__)

    @classmethod
    def from_attention(cls, probs, *, kv_heads=None, model="", tokens=None, pieces=None) -> "Trace":
        """A trace of attention rows in memory, copied only where they are not contiguous float32 of NumPy.

        Args:
          probs: ``[layers, q_heads, steps, steps]``, see `Rows`; or a list or tuple of one array a layer, which may
            have a batch axis of 1 in front, as in transformers' ``output.attentions``. NumPy's, JAX's or torch's, on
            any device, of any float dtype. A 16-bit one becomes ``meta.dtype``, since it bounds how exactly rows sum
            to 1.
          kv_heads: by default ``q_heads``.
          model, tokens, pieces: see `Meta`.

        Raises:
          TraceError: for another shape or dtype, batches of several texts, NaN, infinity, and rows that are no causal
            probabilities.

        >>> rows = np.tril(np.ones((1, 2, 3, 3))) / np.arange(1, 4)[:, None]        # a batch of 1, 2 heads, 3 steps
        >>> Trace.from_attention((rows, rows), kv_heads=1)
        Trace(kind='attention', layers=2, steps=3, q_heads=2, kv_heads=1)
        """
        none = probs is None or (isinstance(probs, list | tuple) and (not probs or any(one is None for one in probs)))
        if none:
            raise TraceError(
                "the model returned no attentions: load it with attn_implementation='eager', and call it with "
                "output_attentions=True"
            )
        layers, _ = by_layer("probs", probs, 3)
        heads, steps, _ = layers[0].shape
        kinds = sorted({layer.dtype.name for layer in layers})
        require(len(kinds) == 1, "probs's dtype", "the same in all layers", " and ".join(kinds))
        axes = {"layers": len(layers), "steps": steps, "q_heads": heads}
        axes["kv_heads"] = heads if kv_heads is None else kv_heads
        dtype = kinds[0] if kinds[0] in DTYPES else "float32"
        meta = Meta(kind="attention", dtype=dtype, model=model, tokens=tokens, pieces=pieces, **axes)
        return cls(meta, _layers(meta, probs=layers).__getitem__)

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
        chosen = [_whole("layer", i, 0, old.layers - 1) for i in (range(old.layers) if layers is None else layers)]
        stop = old.steps if steps is None else _whole("steps", steps, 1, old.steps)
        cut = {name: getattr(old, name) and getattr(old, name)[:stop] for name in ("tokens", "pieces", "positions")}

        def read(index: int) -> QKV | Rows:
            layer = self._read(chosen[index])
            if isinstance(layer, Rows):
                return Rows(layer.probs[:, :stop, :stop])
            return QKV(*(array[:stop] for array in layer))

        return Trace(dataclasses.replace(old, layers=len(chosen), steps=stop, **cut), read)

    def save(self, path: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes the trace to a new directory, its values rounded to ``dtype``, by default ``meta.dtype``.

        Raises:
          TraceError: where `simulator.storage.Writer` does.
        """
        from simulator.storage import Writer

        # Nothing is resumed: half a trace with the same meta may hold other values.
        meta = self.meta if dtype is None else dataclasses.replace(self.meta, dtype=dtype)
        with Writer(path, meta, resume=False) as writer:
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


def _layers(meta: Meta, **arrays: list[np.ndarray]) -> list[QKV | Rows]:
    for name, layers in arrays.items():
        require(len(layers) == meta.layers, f"{name}'s layers", str(meta.layers), len(layers))
    each = [dict(zip(arrays, layer, strict=True)) for layer in zip(*arrays.values(), strict=True)]
    return [layer_of(f"layer {index}", meta, layer) for index, layer in enumerate(each)]


def _cast(where: str, value: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = floats(where, value)
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
            "rows that were rounded to 16 bits have to stay in their dtype, and dropout has to be off (model.eval())"
        )


def _whole(name: str, value: Any, least: int, most: int = _LARGEST) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    require(least <= number <= most, name, f"a whole number from {least} to {most}", value)
    return number


def _text(name: str, value: Any) -> str:
    good = isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")
    require(good, name, "text without lone surrogates", value)
    return value
