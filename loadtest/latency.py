"""Distributions of times, to the microsecond: HDR histograms that can be merged, saved and read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# One hour at most, three digits of each value: 0.1 % of it, or a microsecond.
_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 3_600_000_000, 3
PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)


class Histogram:
    """Times in milliseconds, kept in microseconds.

    locust's own statistics round to 1 ms below 100 ms: a service of 0.33 ms reads as p50 0, p99 1.
    """

    def __init__(self, nanoseconds: NDArray[np.int64] | None = None) -> None:
        self._hdr = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
        self._recorded: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None
        if nanoseconds is not None and len(nanoseconds):
            micro = np.clip(np.round(nanoseconds / 1000), 0, _HIGHEST_US).astype(np.int64)
            for value, count in zip(*(a.tolist() for a in np.unique(micro, return_counts=True)), strict=True):
                self._hdr.record_value(value, count)

    @classmethod
    def decode(cls, text: str) -> Histogram:
        """The histogram that `encode` wrote, in HdrHistogram's own format (V2, deflate, base 64)."""
        made = cls()
        made._hdr = HdrHistogram.decode(text)
        return made

    def encode(self) -> str:
        """The whole distribution as text."""
        encoded = self._hdr.encode()
        return encoded.decode() if isinstance(encoded, bytes) else str(encoded)

    def add(self, other: Histogram) -> None:
        """Count what the other one has counted, too."""
        self._hdr.add(other._hdr)
        self._recorded = None

    def record(self, milliseconds: float) -> None:
        """Count one."""
        self._hdr.record_value(round(milliseconds * 1000))
        self._recorded = None

    @property
    def count(self) -> int:
        """How many were counted."""
        return int(self._hdr.get_total_count())

    @property
    def mean(self) -> float:
        """In milliseconds; 0 of none."""
        values, counts = self.counts()
        return float((values * counts).sum() / self.count) if self.count else 0.0

    @property
    def max(self) -> float:
        """In milliseconds; 0 of none."""
        return float(self._hdr.get_max_value()) / 1000 if self.count else 0.0

    @property
    def min(self) -> float:
        """In milliseconds; 0 of none."""
        return float(self._hdr.get_min_value()) / 1000 if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The milliseconds that `percent` of them did not exceed, by HdrHistogram's rank; 0 of none."""
        if not self.count:
            return 0.0
        rank = max(1, int(min(percent, 100.0) * self.count / 100 + 0.5))
        values, counts = self.counts()
        return float(values[np.searchsorted(np.cumsum(counts), rank)])

    def percentiles(self, percents: Iterable[float] = PERCENTILES) -> dict[str, float]:
        """Percent to milliseconds."""
        return {f"{percent:g}": self.percentile(percent) for percent in percents}

    def at_most(self, milliseconds: float) -> int:
        """How many took no longer."""
        values, counts = self.counts()
        limit = self._hdr.get_highest_equivalent_value(round(milliseconds * 1000)) / 1000
        return int(counts[values <= limit].sum())

    def counts(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The values that occurred, in milliseconds and in order, and how often each did.

        hdrh's own iterators look at each of its 23 000 counters in Python: 0.15 s for every figure.
        """
        if self._recorded is None:
            counters = np.frombuffer(self._hdr.counts, np.uint64)
            used = np.flatnonzero(counters)
            lowest = (self._hdr.get_value_from_index(index) for index in used.tolist())
            values = np.array([self._hdr.get_highest_equivalent_value(value) for value in lowest], np.float64)
            self._recorded = values / 1000, counters[used].astype(np.int64)
        return self._recorded
