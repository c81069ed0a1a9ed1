"""Exact per-version counts and durations, kept apart from how they are published.

One lock and a few additions per request (about 1 µs); Prometheus text is made from them when it is asked for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Values of the `reason` label of Triton's nv_inference_request_failure."""


@dataclass(slots=True)
class Counts:
    """Totals since the version was loaded; durations in nanoseconds."""

    success: int = 0
    failure: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURE_REASONS, 0))
    inferences: int = 0
    executions: int = 0
    request_ns: int = 0
    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0


class Statistics:
    """The counts of one model version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def record_success(self, rows: int, stamps: tuple[int, int, int, int, int, int]) -> None:
        """Count one answered request.

        Args:
            rows: its batch size.
            stamps: `time.monotonic_ns()` when it was received, decoded and started, when its inputs were
                ready, when it had run, and when its outputs were ready.
        """
        received, queued, started, ready, ran, done = stamps
        counts = self._counts
        with self._lock:
            counts.success += 1
            counts.inferences += rows
            counts.executions += 1
            counts.request_ns += done - received
            counts.queue_ns += started - queued
            counts.compute_input_ns += queued - received + ready - started
            counts.compute_infer_ns += ran - ready
            counts.compute_output_ns += done - ran

    def record_failure(self, reason: str) -> None:
        """Count one refused or failed request under one of `FAILURE_REASONS`."""
        with self._lock:
            self._counts.failure[reason] += 1

    def snapshot(self) -> Counts:
        """The totals of one moment."""
        with self._lock:
            return replace(self._counts, failure=dict(self._counts.failure))
