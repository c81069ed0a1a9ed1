"""Prometheus histograms, from exact counts or as values come."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve.model.statistics import Compute

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# 2^17 - 1 ns = 131 µs, about what a gRPC call costs; 2^36 - 1 ns = 69 s.
_SHORTEST, _LONGEST = 17, 36

Samples = list[tuple[str, str, float]]
"""(suffix of the family's name, value of the label `le` or "", value)."""


class Histogram:
    """Values in buckets. Not for several threads at once: the owner's lock keeps it."""

    __slots__ = ("_bounds", "_counts", "_names", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start empty; `bounds` are the buckets' largest values, ascending."""
        self._bounds = bounds
        self._names = [str(bound) for bound in bounds]
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Samples:
        """What was counted."""
        return _samples(self._names, self._counts[:-1], sum(self._counts), self._sum)


def batch_sizes(batches: Mapping[int, Compute]) -> Samples:
    """Runs by their batch rows; the sum is the rows of all of them."""
    counts = [
        sum(runs.count for rows, runs in batches.items() if low < rows <= high)
        for low, high in zip((0, *BATCH_SIZES[:-1]), BATCH_SIZES, strict=True)
    ]
    total = sum(runs.count for runs in batches.values())
    rows = sum(rows * runs.count for rows, runs in batches.items())
    return _samples([str(size) for size in BATCH_SIZES], counts, total, rows)


def latencies(latency: Sequence[int], sum_ns: int) -> Samples:
    """Seconds from receipt to answer.

    Args:
        latency: how many took 2^(i - 1) to 2^i - 1 nanoseconds, at index i.
        sum_ns: nanoseconds of all of them.
    """
    bounds = [str((2**exponent - 1) / 1e9) for exponent in range(_SHORTEST, _LONGEST + 1)]
    counts = [sum(latency[: _SHORTEST + 1]), *latency[_SHORTEST + 1 : _LONGEST + 1]]
    return _samples(bounds, counts, sum(latency), sum_ns / 1e9)


def _samples(bounds: Sequence[str], counts: Sequence[int], total: int, value_sum: float) -> Samples:
    buckets: Samples = [
        ("_bucket", bound, count) for bound, count in zip(bounds, accumulate(counts), strict=True)
    ]
    return [*buckets, ("_bucket", "+Inf", total), ("_sum", "", value_sum), ("_count", "", total)]
