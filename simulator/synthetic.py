"""Synthetic traces, one pattern of attention each, to try a policy before there is a recording.

Every pattern is a family of queries and keys whose dot products have the shape that the pattern is named after, plus
noise. All are seeded: the same arguments give the same trace. Values are noise.

Arguments of all patterns: ``layers``, ``steps``, ``kv_heads``, ``group`` (query heads for each key-value head),
``head_dim``, ``seed``, and ``noise``, the standard deviation of the logits' random part.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from corm_jax.errors import CormError
from corm_jax.traces.trace import Trace

Pattern = Callable[..., Trace]


def noise(**common: Any) -> Trace:
    """No pattern: every logit is random.

    >>> noise(layers=2, steps=10, kv_heads=2, group=3, head_dim=8).layer(1).q.shape
    (10, 6, 8)
    """
    return _Canvas(**common).trace()


def sinks(*, count: int = 4, strength: float = 6.0, **common: Any) -> Trace:
    """Every query puts ``strength`` more on the first ``count`` keys (StreamingLLM, arXiv 2309.17453, figure 2)."""
    canvas = _Canvas(**common)
    canvas.add(np.ones(canvas.steps), np.arange(canvas.steps) < count, strength)
    return canvas.trace()


def local(*, window: float = 16.0, strength: float = 6.0, **common: Any) -> Trace:
    """Attention falls off with the distance d: the logit is ``strength * exp(-d^2 / (2 window^2))``.

    That is the mean of cos(f d) over frequencies f from a normal distribution, approximated by 32 of its quantiles.
    """
    canvas = _Canvas(**common)
    for index in range(32):
        frequency = NormalDist(0, 1 / window).inv_cdf((index + 0.5) / 32)
        canvas.add_cosine(2 * np.pi / frequency, strength / 32)
    return canvas.trace()


def heavy_hitters(*, share: float = 0.05, strength: float = 5.0, **common: Any) -> Trace:
    """A random ``share`` of the keys draws ``strength`` more from every query (H2O, arXiv 2306.14048, section 3)."""
    canvas = _Canvas(**common)
    canvas.add(np.ones(canvas.steps), canvas.rng.random(canvas.steps) < share, strength)
    return canvas.trace()


def periodic(*, period: float = 32.0, strength: float = 6.0, **common: Any) -> Trace:
    """Queries return to the keys one, two, three ... periods ago: between two returns a key is not needed."""
    canvas = _Canvas(**common)
    for harmonic in (1, 2, 3):
        canvas.add_cosine(period / harmonic, strength / 3)
    return canvas.trace()


def topics(*, count: int = 4, length: int = 64, strength: float = 6.0, **common: Any) -> Trace:
    """The text changes among ``count`` topics every ``length`` tokens; queries look for keys of their own topic."""
    canvas = _Canvas(**common)
    changes = canvas.rng.integers(count, size=-(-canvas.steps // length))
    now = np.repeat(changes, length)[: canvas.steps]
    for topic in range(count):
        canvas.add(now == topic, now == topic, strength)
    return canvas.trace()


def needles(*, count: int = 4, strength: float = 12.0, **common: Any) -> Trace:
    """``count`` keys from the first half: each draws ``strength`` more from a single query in the last quarter."""
    canvas = _Canvas(**common)
    steps = canvas.steps
    keys = canvas.rng.choice(max(steps // 2, 1), min(count, max(steps // 2, 1)), replace=False)
    queries = canvas.rng.choice(np.arange(3 * steps // 4, steps), min(len(keys), steps - 3 * steps // 4), replace=False)
    for key, query in zip(keys, queries, strict=False):
        canvas.add(np.arange(steps) == query, np.arange(steps) == key, strength)
    return canvas.trace()


PATTERNS: dict[str, Pattern] = {
    pattern.__name__: pattern for pattern in (noise, sinks, local, heavy_hitters, periodic, topics, needles)
}
"""All patterns, by name."""


class _Canvas:
    """Logits as a sum of features: each adds ``strength * a[t] * b[i]`` to the logit of query t and key i."""

    def __init__(
        self,
        *,
        layers: int = 2,
        steps: int = 256,
        kv_heads: int = 2,
        group: int = 1,
        head_dim: int = 16,
        seed: int = 0,
        noise: float = 1.0,
    ):
        for name, value in {
            "layers": layers, "steps": steps, "kv_heads": kv_heads, "group": group, "head_dim": head_dim
        }.items():  # fmt: skip
            if value < 1:
                raise CormError(f"{name} must be at least 1, not {value}")
        self.steps, self.rng, self.group = steps, np.random.default_rng(seed), group
        # Standard normal vectors have a product with standard deviation sqrt(head_dim), which the scale cancels.
        self.q = noise * self.rng.normal(size=(layers, steps, kv_heads * group, head_dim))
        self.k = self.rng.normal(size=(layers, steps, kv_heads, head_dim))
        self.v = self.rng.normal(size=(layers, steps, kv_heads, head_dim))
        self.features: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, queries: np.ndarray, keys: np.ndarray, strength: float) -> None:
        self.features.append((strength * queries, np.asarray(keys, float)))

    def add_cosine(self, period: float, strength: float) -> None:
        angle = 2 * np.pi * np.arange(self.steps) / period
        for wave in (np.cos, np.sin):  # cos(a - b) = cos a cos b + sin a sin b
            self.add(wave(angle), wave(angle), strength)

    def trace(self) -> Trace:
        # Features have their own coordinates, beside those of the noise.
        scale = self.q.shape[-1] ** -0.5

        def beside(x, features):
            rows = np.stack(features, axis=-1)[None, :, None] if features else np.zeros((1, self.steps, 1, 0))
            return np.concatenate([x, np.broadcast_to(rows, (*x.shape[:-1], rows.shape[-1]))], axis=-1)

        q = beside(self.q, [a / scale for a, _ in self.features])
        k = beside(self.k, [b for _, b in self.features])
        v = np.pad(self.v, ((0, 0),) * 3 + ((0, q.shape[-1] - self.v.shape[-1]),))
        return Trace.from_qkv(q, k, v, scale=scale, model="synthetic")
