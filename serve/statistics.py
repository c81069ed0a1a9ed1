"""Exact per-version counts and durations, and the message that answers them.

One lock and a few additions per request (about 1 µs); Prometheus text is made from them when it is asked for.
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass, field

from serve.pb import grpc_service_pb2 as pb

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Values of the `reason` label of Triton's nv_inference_request_failure."""


@dataclass(slots=True)
class Compute:
    """Runs of one batch size, and the nanoseconds that they took."""

    executions: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@dataclass(slots=True)
class Counts:
    """Totals since the version was loaded.

    Attributes:
        success: requests answered.
        failure: requests refused or failed, by reason.
        inferences: batch rows of the requests answered.
        request_ns: from receipt to answer, nanoseconds of all requests answered.
        queue_ns: of it, waiting for an instance.
        failure_ns: from receipt to refusal, nanoseconds of all requests that failed.
        last_inference_ms: when the last one was answered, milliseconds since 1970; 0: none yet.
        batches: batch size to its runs.
    """

    success: int = 0
    failure: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURE_REASONS, 0))
    inferences: int = 0
    request_ns: int = 0
    queue_ns: int = 0
    failure_ns: int = 0
    last_inference_ms: int = 0
    batches: dict[int, Compute] = field(default_factory=dict)

    def compute(self) -> Compute:
        """The runs of all batch sizes together."""
        total = Compute()
        for batch in self.batches.values():
            total.executions += batch.executions
            total.input_ns += batch.input_ns
            total.infer_ns += batch.infer_ns
            total.output_ns += batch.output_ns
        return total


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
            counts.request_ns += done - received
            counts.queue_ns += started - queued
            counts.last_inference_ms = time.time_ns() // 1_000_000
            batch = counts.batches.get(rows)
            if batch is None:
                batch = counts.batches[rows] = Compute()
            batch.executions += 1
            batch.input_ns += queued - received + ready - started
            batch.infer_ns += ran - ready
            batch.output_ns += done - ran

    def record_failure(self, reason: str, received: int) -> None:
        """Count one request that failed.

        Args:
            reason: one of `FAILURE_REASONS`.
            received: `time.monotonic_ns()` when it was received.
        """
        elapsed = time.monotonic_ns() - received
        with self._lock:
            self._counts.failure[reason] += 1
            self._counts.failure_ns += elapsed

    def snapshot(self) -> Counts:
        """The totals of one moment."""
        with self._lock:
            return copy.deepcopy(self._counts)


def statistics_message(name: str, version: int, counts: Counts) -> pb.ModelStatistics:
    """The counts as the statistics extension answers them."""
    compute, failed = counts.compute(), sum(counts.failure.values())

    def duration(count: int, nanoseconds: int) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=count, ns=nanoseconds)

    return pb.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=counts.last_inference_ms,
        inference_count=counts.inferences,
        execution_count=compute.executions,
        inference_stats=pb.InferStatistics(
            success=duration(counts.success, counts.request_ns),
            fail=duration(failed, counts.failure_ns),
            queue=duration(counts.success, counts.queue_ns),
            compute_input=duration(counts.success, compute.input_ns),
            compute_infer=duration(counts.success, compute.infer_ns),
            compute_output=duration(counts.success, compute.output_ns),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=duration(batch.executions, batch.input_ns),
                compute_infer=duration(batch.executions, batch.infer_ns),
                compute_output=duration(batch.executions, batch.output_ns),
            )
            for size, batch in sorted(counts.batches.items())
        ],
    )
