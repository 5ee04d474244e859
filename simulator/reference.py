"""The specification: eviction rules in plain NumPy loops, written from the papers.

Slow on purpose. There is no JAX here, no slots and no batches; each function reads one sequence through one
key-value head and reports which keys survive. The tests hold the JAX code against it, decision for decision.

Axis names: ``tokens`` (queries and keys, in order), ``group`` (the query heads that share the key-value head),
``head_dim``. Key ``i`` (from 0) has the 1-based position ``i + 1``; the clock ``t`` is the number of tokens seen,
the current one included.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class OverflowedError(Exception):
    """A key arrived, no slot was free, and the caller asked for an error instead of an eviction."""


class Reading(NamedTuple):
    """What one key-value head did with one sequence.

    Attributes:
      kept: after each chunk, the indices (from 0) of the live keys.
      outputs: float64 ``[tokens, group, head_dim]``, the attention outputs.
      overflow: how many keys were evicted because no slot was free.
      margin: the smallest ``|alpha / threshold - 1|`` met, over comparisons that were not exact ties. A test that
        compares with float32 arithmetic skips readings in which rounding can change a decision.
    """

    kept: list[set[int]]
    outputs: np.ndarray
    overflow: int
    margin: float


def stored(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The keys as a cache holds them: where a value is not finite, neither is its key (NaN).

    So the output of a query that sees such a value is NaN, and that of no other query is: see `attention`.

    Args:
      keys, values: ``[tokens, ..., head_dim]``.
    """
    return np.where(np.isfinite(values).all(-1, keepdims=True), keys, np.nan)


def softmax(logits: Sequence[float]) -> list[float]:
    """``exp(l_i) / sum_j exp(l_j)``, shifted by the largest logit; zeros if a logit is NaN, or the largest infinite."""
    largest = max(logits)
    if any(map(math.isnan, logits)) or math.isinf(largest):
        return [0.0] * len(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def attention(
    query, keys, values, live: Sequence[int], logit: Callable[[int, float], float] | None = None
) -> tuple[dict[int, float], np.ndarray]:
    """Attention of one query over the live keys: ``{key: probability}`` and the output ``[head_dim]``.

    ``logit``, if given, says what becomes of the product ``q . k`` of a key; otherwise it is divided by
    ``sqrt(head_dim)``.

    If one of the logits is NaN or +infinity, the softmax is undefined: every probability is 0, and the output is NaN.
    If all logits are -infinity, every probability and the output are 0.
    """
    scale = 1.0 / math.sqrt(len(query))
    logit = logit or (lambda i, product: scale * product)
    with np.errstate(invalid="ignore", over="ignore"):
        logits = [logit(i, float(np.dot(query, keys[i]))) for i in live]
        probabilities = softmax(logits)
        output = np.full(len(values[live[0]]), np.nan if any(math.isnan(x) or x == math.inf for x in logits) else 0.0)
        for i, probability in zip(live, probabilities, strict=True):
            output += probability * values[i]
    return dict(zip(live, probabilities, strict=True)), output


Attend = Callable[..., list]
"""Attention of the queries of a group: ``(queries, keys, values, live, index)``, the last of which is their position.

For each query the result is that of `attention`.
"""


def plain(queries, keys, values, live: Sequence[int], index: int) -> list:
    """`attention` of each query of a group."""
    return [attention(query, keys, values, live) for query in queries]


def important_keys(
    rows: list[dict[int, float]], t: int, *, multiple: int, threshold: str, group: str
) -> tuple[set[int], float]:
    """The keys that the query at clock ``t`` found important, and the smallest margin (see `Reading`).

    ``rows`` holds one ``{key: probability}`` for each query head of the group. A key is important when its
    attention is at least ``m/t`` (``threshold="position"``) or ``m/n`` for ``n`` keys attended (``"live"``), with m the
    ``multiple``, in the paper 1: for any query head of the group (``group="any"``) or in the mean over the group
    (``"mean"``).
    """
    important, margin = set(), math.inf
    for i in rows[0]:
        n = t if threshold == "position" else len(rows[0])
        each = [row[i] for row in rows]
        alphas = [math.fsum(each) / len(each)] if group == "mean" else each
        for alpha in alphas:
            ratio = alpha * n / multiple
            if abs(ratio - 1) < 1e-12:  # a tie in exact arithmetic: equal logits on all n keys
                ratio = 1
                if group == "mean" and max(each) - min(each) > 1e-12:  # p and 1 - p, say: in float32 no tie
                    margin = 0.0
            else:
                margin = min(margin, abs(ratio - 1))
            if ratio >= 1:
                important.add(i)
    return important, margin


def corm_messages(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    window: int,
    recent: int,
    multiple: int = 1,
    threshold: str = "position",
    group: str = "any",
    eager: bool = False,
    chunks: Sequence[int] | None = None,
    capacity: int | None = None,
    overflow: str = "evict",
    attend: Attend | None = None,
) -> Reading:
    """CORM with the paper's message matrix (arXiv 2404.15949, section 4 and algorithm 1).

    Every query leaves a row of messages: which keys it found important. Once ``window`` queries were seen, a key
    goes when its column over the last ``window`` rows is empty, unless it is among the newest ``recent`` keys.
    A key that went is gone from every later attention, which is renormalised over what is left.

    Args:
      queries: ``[tokens, group, head_dim]``, rotated.
      keys, values: ``[tokens, head_dim]``.
      window, recent: ``w`` and ``r``, at least 1.
      multiple: m, at least 1: how many times as much attention makes a key important.
      threshold: ``"position"`` (m/t) or ``"live"`` (m over the number of keys attended).
      group: ``"any"`` or ``"mean"`` over the query heads that share a key.
      eager: judge on the rows there are when fewer than ``window`` queries were seen.
      chunks: chunk sizes, which sum to ``tokens``; default all 1. Queries of a chunk attend over the keys live when
        the chunk began and, causally, over the chunk; the rule is applied once, at the chunk's end. One chunk for the
        whole prompt is the one-shot prompt.
      capacity: slots; default unlimited. Without a free slot the key whose newest message is the oldest goes first
        (never important before ever important, ties: oldest key), newest ``recent`` exempt.
      overflow: ``"evict"``, or ``"error"`` to raise `OverflowedError`.
      attend: how queries attend; by default by `attention`.
    """
    (tokens, heads, _), keys = queries.shape, stored(keys, values)
    messages: list[set[int]] = []  # row t - 1: the keys that the query at clock t found important
    live: list[int] = []
    kept, outputs, lost, margin = [], np.zeros((tokens, heads, values.shape[1])), 0, math.inf

    def newest_message(i):
        return max((row for row, found in enumerate(messages) if i in found), default=-1)

    start = 0
    for size in [1] * tokens if chunks is None else chunks:
        end = start + size
        # Make room: the newest `recent` of all keys, the arriving chunk included, are exempt.
        while capacity is not None and len(live) + size > capacity:
            if overflow == "error":
                raise OverflowedError(f"{len(live)} live keys and {size} new ones exceed {capacity} slots")
            candidates = [i for i in live if i + 1 <= end - recent]
            live.remove(min(candidates, key=lambda i: (newest_message(i), i)))
            lost += 1
        live = live + list(range(start, end))
        for index in range(start, end):
            t = index + 1
            visible = [i for i in live if i <= index]
            each = (attend or plain)(queries[index], keys, values, visible, index)
            rows = [row for row, _ in each]
            outputs[index] = [output for _, output in each]
            found, closest = important_keys(rows, t, multiple=multiple, threshold=threshold, group=group)
            margin = min(margin, closest)
            messages.append(found)
        t = end
        if t >= window or eager:
            last_rows = messages[-window:]
            live = [
                i
                for i in live
                if any(i in row for row in last_rows)  # somebody asked for it
                or i + 1 > t - recent  # or it is recent
            ]
        kept.append(set(live))
        start = end
    return Reading(kept, outputs, lost, margin)
