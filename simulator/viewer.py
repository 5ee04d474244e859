"""A replay as one HTML page: the text, each token shaded by how many heads still hold its key, at any time.

The page is made of the files in ``page``, and of two scripts that hold data and are not run: a JSON object, and the
arrays of `whole_numbers`, deflated and in base64. It needs no network, and its content security policy allows nothing
but its own style and script: text from a trace is never executed.

An evicted key never comes back, so one number for each layer, head and token says everything that a time of the slider
shows: the last query that could attend to the key.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from corm_jax.errors import CormError
from corm_jax.terminal.limits import check_memory
from corm_jax.traces.meta import Meta
from corm_jax.traces.trace import Trace
from simulator.oracle import attention
from simulator.replay import FOREVER, Replay

TOKENS, HEADS = 4096, 1024
"""The most tokens, and pairs of a layer and a key-value head, that a page shows unless it is asked for more."""

MOST_TOKENS, MOST_NUMBERS = 16_384, 2**23
"""The most tokens that a page can show, and the most keys: tokens x layers x key-value heads."""

FAR = 64
"""The distance in tokens from which on a query counts as far from a key."""

NEAR_QUERIES, FAR_QUERIES = 4, 8
"""How many queries a page holds for each token: of the near ones and of the far ones, those that attend to it most."""

PIECE = 200
"""The most characters of a token that are shown."""

SCRIPTS = ("replay.js", "panels.js", "chosen.js", "main.js")
"""The scripts of the page, which are joined into one."""

NONE = 65_535
"""The number of 16 bits that stands for never, or for no query, in the page."""


class Part(NamedTuple):
    """The part of a trace that a page shows.

    Attributes:
      trace: the part.
      layers: the indices of its layers in the whole trace.
      left_out: sentences that tell the reader of the page what is not shown.
    """

    trace: Trace
    layers: list[int]
    left_out: list[str]


def part(trace: Trace, layers: Sequence[int] | None = None, tokens: int | None = None) -> Part:
    """The part of a trace that fits into a page: the given part, or the first `TOKENS` tokens and up to `HEADS` heads.

    If there are more heads, layers at equal distances are shown, the first and the last among them.

    Raises:
      CormError: if more is asked for than a page can hold.

    >>> from simulator.synthetic import noise
    >>> shown = part(noise(layers=3, steps=32), layers=[0, 2], tokens=16)
    >>> shown.trace.meta.steps, shown.layers, shown.left_out
    (16, [0, 2], ['Tokens 16 to 31 of the trace are left out.', 'Layer 1 is left out.'])
    """
    meta = trace.meta
    steps = min(meta.steps, TOKENS) if tokens is None else tokens
    chosen = list(range(meta.layers) if layers is None else layers)
    if steps > MOST_TOKENS:
        raise CormError(f"a page shows at most {MOST_TOKENS:,} tokens, not {steps:,}: lower --tokens")
    if layers is None:
        count = min(meta.layers, max(1, min(HEADS, MOST_NUMBERS // steps) // meta.kv_heads))
        chosen = [int(index) for index in np.linspace(0, meta.layers - 1, count).round()]
    if (numbers := steps * len(chosen) * meta.kv_heads) > MOST_NUMBERS:
        raise CormError(
            f"a page shows at most {MOST_NUMBERS:,} keys, and {steps:,} tokens in {len(chosen)} layers of "
            f"{meta.kv_heads} heads have {numbers:,}: lower --tokens, or name fewer --layers"
        )
    shown, left_out = trace.part(layers=chosen, steps=steps), []
    if steps < meta.steps:
        left_out.append(f"{_counted('Token', range(steps, meta.steps))} of the trace are left out.")
    if missing := sorted(set(range(meta.layers)) - set(chosen)):
        left_out.append(f"{_counted('Layer', missing)} {'is' if len(missing) == 1 else 'are'} left out.")
    return Part(shown, chosen, left_out)


class Strongest(NamedTuple):
    """The queries that attend to each key most, with the full cache. The key's own query is left out.

    The first `NEAR_QUERIES` entries are queries less than `FAR` tokens later, the other `FAR_QUERIES` are later ones. A
    query that attends to the key in several heads is listed once, with the head in which it attends most.

    Attributes:
      query: int32 ``[keys, queries]``, from 0; -1 if there are fewer queries.
      head: int32 ``[keys, queries]``, layer * kv_heads + key-value head.
      attention: float32 ``[keys, queries]``, the mean over the query heads that share the key.
    """

    query: np.ndarray
    head: np.ndarray
    attention: np.ndarray


def strongest(trace: Trace, progress: Callable[[int], None] = lambda done: None) -> Strongest:
    """The queries that attend most to each key of a trace.

    Args:
      progress: called with the number of layers done.

    Raises:
      TraceError: when a layer of the trace cannot be read.

    >>> rows = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.7, 0.2, 0.1]])
    >>> found = strongest(Trace.from_attention(rows[None, None]))
    >>> found.query[:, :3]
    array([[ 2,  1, -1],
           [ 2, -1, -1],
           [-1, -1, -1]], dtype=int32)
    """
    steps, heads = trace.meta.steps, trace.meta.kv_heads
    check_memory(16 * steps**2, f"the attention of {steps:,} queries", "lower --tokens")
    best, which = np.zeros((steps, steps), np.float32), np.zeros((steps, steps), np.uint16)
    for layer in range(trace.meta.layers):
        for head, alpha in enumerate(attention(trace, layer)):
            larger = alpha > best
            np.copyto(best, alpha, where=larger)
            np.copyto(which, layer * heads + head, where=larger)
        progress(layer + 1)
    best, which = best.T, which.T  # [keys, queries]
    distance = np.arange(steps) - np.arange(steps)[:, None]
    near = _largest(np.where((distance > 0) & (distance < FAR), best, 0), NEAR_QUERIES)
    far = _largest(np.where(distance >= FAR, best, 0), FAR_QUERIES)
    query = np.concatenate([near, far], axis=1)
    taken = np.maximum(query, 0)
    head, share = (np.take_along_axis(x, taken, axis=1) for x in (which, best))
    return Strongest(query, head.astype(np.int32), np.where(query < 0, 0, share))


def _largest(weights: np.ndarray, count: int) -> np.ndarray:
    """The columns of the ``count`` largest weights of each row, the largest first; -1 where a weight is 0."""
    padded = np.pad(weights, ((0, 0), (0, max(0, count - weights.shape[1]))))
    top = np.argpartition(-padded, count - 1, axis=1)[:, :count]
    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(padded, top, axis=1), axis=1, kind="stable"), axis=1)
    return np.where(np.take_along_axis(padded, top, axis=1) > 0, top, -1).astype(np.int32)


def page(shown: Part, replays: Mapping[str, Replay], found: Strongest, options: Mapping[str, Any]) -> str:
    """The page, as HTML.

    Args:
      replays: one or two replays of that part of the trace, by SPEC. Two are shown side by side.
      found: the queries that attend most to the keys of that part.
      options: ``fidelity``, ``capacity``, ``chunk`` and ``prompt``, as they were replayed.
    """
    meta = shown.trace.meta
    arrays = _arrays(list(replays.values()), found)
    left_out = [*shown.left_out, *_cut(meta)]
    about = {
        "model": meta.model,
        "tokens": meta.steps,
        "layers": shown.layers,
        "heads": meta.kv_heads,
        "group": meta.group,
        "pieces": meta.pieces and [piece[:PIECE] + "…" * (len(piece) > PIECE) for piece in meta.pieces],
        "ids": meta.tokens,
        "positions": None if meta.pieces else meta.positions,
        "policies": list(replays),
        "options": dict(options),
        "far": FAR,
        "strongest": [NEAR_QUERIES, FAR_QUERIES],
        "left_out": left_out,
        "arrays": [[name, array.size] for name, array in arrays.items()],
    }
    style, script = _asset("page.css"), "\n".join(map(_asset, SCRIPTS))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    parts = {
        "TITLE": html.escape(f"{_line(meta.model) or 'a trace'}: {' and '.join(replays)}"),
        "POLICY": html.escape(policy),
        "STYLE": style,
        "SCRIPT": script,
        "ABOUT": _json(about),
        "ARRAYS": base64.b64encode(whole_numbers(list(arrays.values()))).decode(),
    }
    return re.sub("<!--([A-Z]+)-->", lambda found: parts[found[1]], _asset("page.html"))


def whole_numbers(arrays: Sequence[np.ndarray]) -> bytes:
    """Arrays of whole numbers from 0 to `NONE`, one after the other, deflated: all low bytes, then all high bytes.

    >>> packed = whole_numbers([np.array([[1, 2], [3, 257]]), np.array([NONE])])
    >>> list(zlib.decompress(packed))
    [1, 2, 3, 1, 255, 0, 0, 0, 1, 255]
    """
    numbers = np.concatenate([np.asarray(array).ravel() for array in arrays])
    low, high = (numbers & 255).astype(np.uint8), (numbers >> 8).astype(np.uint8)
    return zlib.compress(low.tobytes() + high.tobytes(), 9)


def _arrays(replays: Sequence[Replay], strongest: Strongest) -> dict[str, np.ndarray]:
    """The arrays from which the page computes all that it shows, by name. Attention is in ten-thousandths."""
    found = {}
    for index, replay in enumerate(replays):
        found[f"until{index}"] = np.where(replay.until == FOREVER, NONE, replay.until)
        found[f"lost{index}"] = replay.lost.astype(np.int32)
    found["needed"] = replays[0].needed
    found["query"] = np.where(strongest.query < 0, NONE, strongest.query)
    found["head"] = strongest.head
    found["attention"] = (10_000 * strongest.attention).round().astype(np.int32)
    return found


def _cut(meta: Meta) -> list[str]:
    """Sentences that tell which part of the text the page does not show."""
    if meta.pieces is None:
        return ["The trace holds no text: tokens are shown by their positions."]
    cut = sum(len(piece) > PIECE for piece in meta.pieces)
    return [f"Only the first {PIECE} characters of {cut:,} long tokens are shown."] if cut else []


def _json(value: Any) -> str:
    """JSON text that cannot end the script element that holds it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return files("simulator").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _line(text: str) -> str:
    return " ".join(text.split())


def _counted(what: str, numbers: Sequence[int]) -> str:
    """Numbers in words, in ascending order.

    >>> _counted("Layer", [3]), _counted("Layer", [0, 2, 3, 4, 6])
    ('Layer 3', 'Layers 0, 2 to 4, 6')
    """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda at: at[1] - at[0])]
    parts = [f"{run[0]:,}" if len(run) == 1 else f"{run[0]:,} to {run[-1]:,}" for run in runs]
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"
