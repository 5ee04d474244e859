"""Means with their intervals, by the bootstrap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean, and the interval that holds 95% of its bootstrap resamples (Efron 1979; percentiles)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        known = np.isfinite(self.low)
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if known else f"{self.mean:.3f} [?]"


def bootstrap(*strata: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """The mean over strata of the mean over their examples, which are resampled within each stratum.

    If a stratum has a single example, its variance is unknown and the interval is infinite.

    >>> bootstrap([1.0, 2.0, 3.0, 4.0])
    Interval(mean=2.5, low=1.5, high=3.5)
    >>> bootstrap([1.0, 1.0], [4.0, 4.0, 4.0])
    Interval(mean=2.5, low=2.5, high=2.5)
    """
    arrays, rng = [np.asarray(values, np.float64) for values in strata], np.random.default_rng(seed)
    mean = float(np.mean([array.mean() for array in arrays]))
    if min(map(len, arrays)) < 2:
        return Interval(mean, -np.inf, np.inf)
    drawn = [array[rng.integers(len(array), size=(RESAMPLES, len(array)))].mean(1) for array in arrays]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return Interval(mean, float(low), float(high))
