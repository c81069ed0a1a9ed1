"""Latencies of a run, counted to the microsecond."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 600_000_000, 3
PERCENTILES = (50.0, 90.0, 99.0)


class LatencyRecorder:
    """An HDR histogram of the answered requests, and the failures by status.

    locust's own statistics round to 1 ms below 100 ms: a service of 0.33 ms reads as p50 0, p99 1.
    """

    def __init__(self) -> None:
        self._histogram = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
        self.failures: Counter[str] = Counter()

    @property
    def answered(self) -> int:
        """How many requests were answered."""
        return int(self._histogram.get_total_count())

    def record(self, milliseconds: float) -> None:
        """Count an answered request."""
        self._histogram.record_value(round(milliseconds * 1000))

    def percentile(self, percent: float) -> float:
        """The latency in milliseconds that `percent` of the answered requests did not exceed."""
        return float(self._histogram.get_value_at_percentile(percent)) / 1000

    def table(self, seconds: float, percentiles: Iterable[float] = PERCENTILES) -> str:
        """Throughput, percentiles and failures as the lines of a report."""
        rows = [
            ("requests answered", f"{self.answered}"),
            ("throughput", f"{self.answered / seconds:.1f} requests/s"),
            ("mean", f"{self._histogram.get_mean_value() / 1000:.3f} ms"),
            *((f"p{percent:g}", f"{self.percentile(percent):.3f} ms") for percent in percentiles),
            ("max", f"{self._histogram.get_max_value() / 1000:.3f} ms"),
            ("failed", f"{self.failures.total()}"),
            *((f"  {status}", str(count)) for status, count in self.failures.most_common()),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)
