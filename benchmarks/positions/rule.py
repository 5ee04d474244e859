"""A rule for CORM: can it be told its window w from the queries of a model alone.

What w should be is measured: `needed`, the least w with which 95% of the keys that a query finds important were found
important by one of the w queries before it, or are not older than w. What queries alone say is how alike they are by
distance. The rule that is tried: w is a power of the distance D at which likeness has fallen half of the way from
distance 1 to far away, ``ln w = a + b ln D`` with a and b by least squares over the heads of some models, judged on the
heads of others.
"""

from typing import Any

import numpy as np

import corm_jax as cj
from corm_jax.runs.forms import written
from corm_jax.runs.recording import record

SHARE = 0.95
FIRST = 64
"""Queries before this one are not counted: they see few keys."""


def of_text(model: cj.Transformer, tokens: list[int]) -> dict[str, Any]:
    """For each layer and head the window that is `needed`, and the distance at which likeness is `halved`."""
    form = written(model, len(tokens))
    slopes = np.asarray(form.slopes or [0.0] * model.config.heads)
    found: dict[str, Any] = {"needed": [], "halved": []}
    for one in record(model, tokens):
        attention = [rows(one.q[:, head], one.k[:, head], slope) for head, slope in enumerate(slopes)]
        found["needed"].append([needed(alpha) for alpha in attention])
        found["halved"].append([halved(one.q[:, head]) for head in range(len(slopes))])
    return found


def rows(q: np.ndarray, k: np.ndarray, slope: float) -> np.ndarray:
    """The attention of one head, ``[queries, keys]``."""
    distance = np.arange(len(q))[:, None] - np.arange(len(q))
    logits = np.where(distance >= 0, q @ k.T * q.shape[-1] ** -0.5 - slope * distance, -np.inf)
    alpha = np.exp(logits - logits.max(-1, keepdims=True))
    return alpha / alpha.sum(-1, keepdims=True)


def needed(alpha: np.ndarray) -> int:
    """The least window that covers `SHARE` of what queries find important.

    A key is covered by w if one of the w queries before found it important, or if it is not older than w: its gap, to
    the last such query or to its own token, is at most w.

    >>> needed(np.eye(100))                       # each query finds itself important, and nothing else
    1
    """
    gaps, last = [], np.zeros(len(alpha), int)
    for t in range(len(alpha)):
        important = np.flatnonzero(alpha[t] * (t + 1) >= 1)
        if t >= FIRST:
            gaps.append(np.maximum(np.where(important == t, 1, t - last[important]), 1))
        last[t] = t
        last[important] = t
    return int(np.quantile(np.concatenate(gaps), SHARE, method="inverted_cdf"))


def halved(q: np.ndarray) -> int:
    """The distance at which the mean cosine of queries has fallen half of the way from distance 1 to a half text.

    >>> halved(np.repeat(np.random.default_rng(0).normal(size=(64, 32)), 8, axis=0))      # alike in runs of 8
    5
    """
    unit = q / np.linalg.norm(q, axis=-1, keepdims=True)
    alike = unit @ unit.T
    by_distance = np.array([alike.diagonal(d).mean() for d in range(1, len(q) // 2)])
    far = by_distance[-len(by_distance) // 4 :].mean()
    return int(np.argmax(by_distance <= (by_distance[0] + far) / 2)) + 1


def fit(needed: np.ndarray, halved: np.ndarray) -> tuple[float, float]:
    """The numbers a and b of ``ln w = a + b ln D``."""
    b, a = np.polyfit(np.log(halved), np.log(needed), 1)
    return float(a), float(b)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, with the mean of ranks for ties."""

    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])
