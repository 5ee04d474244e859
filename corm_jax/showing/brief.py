"""Results in one line, and as a small table for notebooks. What holds no numbers (yet) shows its shapes."""

import reprlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def line(name: str, *parts: str, **named: Any) -> str:
    """A ``repr``: the name, and in brackets what is known, without what is None.

    >>> line("Replay", "Full()", layers=2, error=None, kept="0.25")
    'Replay(Full(), layers=2, kept=0.25)'
    """
    return f"{name}({', '.join([*parts, *(f'{key}={value}' for key, value in named.items() if value is not None)])})"


def leaves(name: str, values: Iterable[Any]) -> str:
    """A ``repr`` of what holds no numbers, or not yet: of arrays their dtypes and shapes.

    >>> leaves("Bounds", (np.ones((2, 3)), None, "a"))
    "Bounds(float64[2, 3], None, 'a')"
    """

    def one(x):
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else reprlib.repr(x)

    return f"{name}({', '.join(map(one, values))})"


def table(title: str, rows: Mapping[str, Any]) -> str:
    """A table of two columns in HTML, without what is None.

    >>> table("Usage", {"live": "<1", "error": None})  # doctest: +ELLIPSIS
    '<table><thead>...Usage...</thead><tbody><tr><td>live</td><td>&lt;1</td></tr></tbody></table>'
    """
    cells = [
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
        if value is not None
    ]
    head = f'<thead><tr><th colspan="2">{escape(title)}</th></tr></thead>'
    return f"<table>{head}<tbody>{''.join(cells)}</tbody></table>"


def numbers(x: Any) -> np.ndarray | None:
    """The numbers of an array, or None where there are none: while a program is traced, after a donation, elsewhere."""
    if isinstance(x, jax.Array):
        if isinstance(x, Tracer) or x.is_deleted() or not x.is_fully_addressable:
            return None
        return np.asarray(x)
    return x if isinstance(x, np.ndarray) else None


def between(values: Any, how: str = "") -> str:
    """One number, or the least and the largest if they differ.

    >>> between([1.0, 2.0], ".1f"), between(3)
    ('1.0..2.0', '3')
    """
    low, high = (format(value, how) for value in (np.min(values), np.max(values)))
    return low if low == high else f"{low}..{high}"
