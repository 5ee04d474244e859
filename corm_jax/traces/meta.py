"""The parts of a trace: its description, the arrays of one layer, and the checks of both.

Axis names: ``layers``; ``steps``, the queries and keys in order; ``q_heads``; ``kv_heads``, where query heads
``h * group`` to ``h * group + group - 1`` share key-value head ``h``; ``head_dim``.
"""

import itertools
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from corm_jax.traces.arrays import DTYPES, TraceError, floats, require

_LARGEST = 2**31 - 1  # positions are int32 everywhere


class QKV(NamedTuple):
    """One layer of a ``qkv`` trace, keys and queries rotated by RoPE already: ``logits = scale * q . k``, see `Meta`.

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
      probs: float32 ``[q_heads, steps, steps]``. Row ``t`` holds the probabilities of query ``t`` (from 0): none
        is negative, those of keys after ``t`` and outside of the layer's window are 0, and their sum is 1 up to
        rounding.
    """

    probs: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The description of a trace, and the form of its attention.

    In a ``qkv`` trace the logit of the query at t for the key at p is

        cap(scale q . k) - slope (t - p),      cap(x) = softcap tanh(x / softcap)

    for the keys of its window, ``t - p < window``, or for all earlier keys.

    Attributes:
      kind: ``"qkv"`` or ``"attention"``.
      layers, steps, q_heads, kv_heads: at least 1; ``q_heads`` is a multiple of ``kv_heads``.
      head_dim: the size of a key in a ``qkv`` trace; None otherwise.
      scale: the factor of the products in a ``qkv`` trace, by default ``head_dim ** -0.5``; None otherwise.
      softcap: the limit of the logits in a ``qkv`` trace; None for no limit.
      slopes: of ALiBi in a ``qkv`` trace, one for each query head, the same in all layers; None for no bias.
      windows: for each layer how many positions a query sees, its own included; None for all. A layer with a window is
        *local*. None: no layer is.
      model: the name of the model, free text.
      dtype: the dtype to which stored values are rounded: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
      tokens, pieces: the id and the text of each token; None where unknown.
      positions: the position of each step, strictly increasing; by default 0 to ``steps - 1``.

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
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    windows: tuple[int | None, ...] | None = None
    model: str = ""
    dtype: str = "float32"
    tokens: tuple[int, ...] | None = field(default=None, repr=False)
    pieces: tuple[str, ...] | None = field(default=None, repr=False)
    positions: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self):
        require(self.kind in ("qkv", "attention"), "kind", "'qkv' or 'attention'", self.kind)
        for name in ("layers", "steps", "q_heads", "kv_heads"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        require(self.q_heads % self.kv_heads == 0, "q_heads", f"a multiple of kv_heads={self.kv_heads}", self.q_heads)
        if self.kind == "qkv":
            object.__setattr__(self, "head_dim", whole_number("head_dim", self.head_dim, 1))
            scale = (self.head_dim or 1) ** -0.5 if self.scale is None else self.scale
            for name, value in {"scale": scale, "softcap": self.softcap}.items():
                if value is not None:
                    object.__setattr__(self, name, _finite(name, value, "a finite positive number", above=0))
        else:
            for name in ("head_dim", "scale", "softcap", "slopes"):
                require(getattr(self, name) is None, name, "None in an attention trace", getattr(self, name))
        self._check_heads_and_layers()
        _text("model", self.model)
        require(isinstance(self.dtype, str) and self.dtype in DTYPES, "dtype", f"one of {[*DTYPES]}", self.dtype)
        positions = tuple(range(self.steps)) if self.positions is None else self.positions
        for name, values in {"tokens": self.tokens, "pieces": self.pieces, "positions": positions}.items():
            check = _text if name == "pieces" else partial(whole_number, least=0)
            self._set_list(name, values, "step", check)
        rising = all(first < second for first, second in itertools.pairwise(self.positions or ()))
        require(rising, "positions", "strictly increasing", self.positions)

    def _check_heads_and_layers(self) -> None:
        self._set_list("slopes", self.slopes, "q_head", partial(_finite, what="a finite number", above=-math.inf))

        def window(name: str, value: Any) -> int | None:
            return None if value is None else whole_number(name, value, 1)

        self._set_list("windows", self.windows, "layer", window)
        if not self.local:
            object.__setattr__(self, "windows", None)

    def _set_list(self, name: str, values: Any, axis: str, check: Callable[[str, Any], Any]) -> None:
        """Sets a field to a tuple of values, of which there is one for each step, head or layer, unless it is None."""
        if values is None:
            return
        values, size = values.tolist() if hasattr(values, "tolist") else values, getattr(self, f"{axis}s")
        require(isinstance(values, list | tuple), name, f"a list with one entry a {axis}", values)
        require(len(values) == size, f"len({name})", f"{axis}s={size}", len(values))
        object.__setattr__(self, name, tuple(check(f"{name}[{index}]", value) for index, value in enumerate(values)))

    @property
    def local(self) -> tuple[int, ...]:
        """The numbers of the layers that have a window."""
        return tuple(layer for layer, window in enumerate(self.windows or ()) if window is not None)

    @property
    def group(self) -> int:
        """How many query heads share a key-value head."""
        return self.q_heads // self.kv_heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a layer, by name."""
        if self.kind == "attention":
            return {"probs": (self.q_heads, self.steps, self.steps)}
        keys = (self.steps, self.kv_heads, self.head_dim or 0)
        return {"q": (self.steps, self.q_heads, self.head_dim or 0), "k": keys, "v": keys}


def layer_of(where: str, index: int, meta: Meta, tensors: dict[str, Any], dtype: str = "float32") -> QKV | Rows:
    """Layer ``index`` of these tensors, rounded to ``dtype`` and read-only, copied only if rounding changes them.

    Raises:
      TraceError: for names or shapes other than those of ``meta``, other dtypes than floats, or invalid values.
    """
    shapes = meta.shapes
    require(tensors.keys() == shapes.keys(), where, " and ".join(shapes), " and ".join(tensors))
    cast = {name: _cast(f"{where}: {name}", tensors[name], shapes[name], dtype) for name in shapes}
    if meta.kind == "qkv":
        return QKV(**cast)
    for head, rows in enumerate(cast["probs"]):
        window = meta.windows[index] if meta.windows else None
        _check_rows(f"{where}: probs of head {head}", rows.astype(np.float32, copy=False), meta, window)
    return Rows(**cast)


def _cast(where: str, value: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = floats(where, value)
    require(array.shape == shape, f"{where}'s shape", str(shape), array.shape)
    with np.errstate(all="ignore"):  # an overflow is reported below
        cast = np.ascontiguousarray(array, DTYPES[dtype]).view()
    if not np.isfinite(cast).all():
        if not np.isfinite(array).all():
            raise TraceError(f"{where} contains NaN or infinity")
        wider = "bfloat16" if dtype == "float16" else "float32"
        advice = "scale it down" if dtype == "float32" else f"store it as {wider!r}"
        raise TraceError(f"{where} has values beyond {dtype}'s {ml_dtypes.finfo(DTYPES[dtype]).max}: {advice}")
    cast.flags.writeable = False
    return cast


def _check_rows(where: str, rows: np.ndarray, meta: Meta, window: int | None) -> None:
    if (rows < 0).any():
        raise TraceError(f"{where} must not be negative")
    if np.triu(rows, 1).any():
        raise TraceError(f"{where} must be causal: 0 for keys after the query")
    if window is not None and np.tril(rows, -window).any():
        raise TraceError(f"{where} must be 0 for keys outside of the layer's window of {window}")
    # Float32 rows of other frameworks sum to 1 within 1e-3. Rounding changes a row's sum by at most half an epsilon, if
    # all entries are rounded in the same direction, and by half the smallest step for each subnormal entry.
    kind = ml_dtypes.finfo(DTYPES[meta.dtype])
    slack = 1e-3 + float(kind.eps) / 2 + meta.steps * float(kind.smallest_subnormal) / 2
    sums = rows.sum(-1, dtype=np.float64)
    row = int(np.abs(sums - 1).argmax())
    if abs(sums[row] - 1) > slack:
        raise TraceError(
            f"{where}, row {row}, must sum to 1 within {slack:.2g} for {meta.dtype}, not to {sums[row]:.6g}: "
            "rows that were rounded to 16 bits have to stay in their dtype, and dropout has to be off (model.eval())"
        )


def whole_number(name: str, value: Any, least: int, most: int = _LARGEST) -> int:
    """A whole number from ``least`` to ``most``.

    Raises:
      TraceError: for anything else.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    require(least <= number <= most, name, f"a whole number from {least} to {most}", value)
    return number


def _finite(name: str, value: Any, what: str, above: float) -> float:
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    good = isinstance(value, int | float) and not isinstance(value, bool)
    require(good and max(above, -sys.float_info.max) < value <= sys.float_info.max, name, what, value)
    return float(value)


def _text(name: str, value: Any) -> str:
    good = isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")
    require(good, name, "text without lone surrogates", value)
    return value
