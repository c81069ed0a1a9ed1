"""From how often an activation's numbers come to the range that its rounded form covers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BINS = 4096
LEVELS = 256
OUTSIDE = 1e-5
"""Part of the numbers that a percentile range leaves out, on both sides together."""
FRACTIONS = np.linspace(1, 0.1, 64)
"""Of the largest magnitude, where an entropy range may end."""


class Histogram:
    """Counts of numbers in bins of equal width.

    Attributes:
        counts: INT64 [4096].
        edges: FP64 [4097]; the outermost are the smallest and largest number that come.
    """

    def __init__(self, low: float, high: float) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
        self._exact = (low, high)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        return self._exact

    def add(self, numbers: np.ndarray) -> None:
        """Count these numbers, of any shape; what a rounding error puts outside counts at the edge."""
        low, high = self.edges[0], self.edges[-1]
        places = ((numbers.reshape(-1) - np.float32(low)) * np.float32(BINS / (high - low))).astype(np.int64)
        self.counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)


def percentile(histogram: Histogram) -> tuple[float, float]:
    """All but the outermost 0.001 % of the numbers, half of that on each side."""
    shares = histogram.counts.cumsum() / max(1, histogram.counts.sum())
    low = int(np.searchsorted(shares, OUTSIDE / 2, side="right"))
    high = int(np.searchsorted(shares, 1 - OUTSIDE / 2))
    return _inside(histogram, histogram.edges[low], histogram.edges[min(high, BINS - 1) + 1])


def entropy(histogram: Histogram) -> tuple[float, float]:
    """The range whose 256 levels tell most about the numbers: least Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", GTC 2017. The range is cut at one magnitude on both sides. Zeros
    are left out of the count: rounding keeps them exact, and after a ReLU they would outweigh all else.
    """
    low, high = histogram.range
    counts = histogram.counts.astype(np.float64)
    if low <= 0 <= high:
        counts[int(np.clip(np.searchsorted(histogram.edges, 0, side="right") - 1, 0, BINS - 1))] = 0
    largest = max(abs(low), abs(high))
    best = min(FRACTIONS, key=lambda part: _divergence(histogram.edges, counts, part * largest))
    return _inside(histogram, -best * largest, best * largest)


def _divergence(edges: np.ndarray, counts: np.ndarray, threshold: float) -> float:
    """Of the counts within +-threshold, those outside added to the ends, from their form in 256 levels."""
    first, last = np.clip(np.searchsorted(edges, (-threshold, threshold)), 0, BINS)
    first = max(0, first - 1) if edges[first] > -threshold else first
    kept = counts[first:last]
    if (total := kept.sum()) == 0:
        return np.inf
    exact = kept.copy()
    exact[0] += counts[:first].sum()
    exact[-1] += counts[last:].sum()
    level = np.arange(len(kept)) * LEVELS // len(kept)
    filled = kept > 0
    sums = np.bincount(level, kept, LEVELS)
    per_bin = sums / np.maximum(1, np.bincount(level, filled, LEVELS))
    rounded = np.where(filled, per_bin[level], 0)
    present = exact > 0
    smooth = np.maximum(rounded[present] / total, 1e-12)
    share = exact[present] / exact.sum()
    return float((share * np.log(share / smooth)).sum())


def _inside(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """The bounds, cut to what comes."""
    smallest, largest = histogram.range
    return float(max(low, smallest)), float(min(high, largest))


THRESHOLDS: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "percentile": percentile,
    "entropy": entropy,
}
