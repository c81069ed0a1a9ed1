"""Exact per-version counts and durations, and the message that answers them.

One lock and a few additions per run and request (about 1 µs); Prometheus text is made from them when it is
asked for.
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.request import Call

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Values of the `reason` label of Triton's nv_inference_request_failure."""


@dataclass(slots=True)
class Compute:
    """How often something was computed, and the nanoseconds that it took."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0

    def add(self, count: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count `count` more, of so many nanoseconds in all."""
        self.count += count
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns


@dataclass(slots=True)
class Counts:
    """Totals since the version was loaded.

    Attributes:
        requests: requests answered; each has the whole time of the run that it was part of.
        failure: requests refused or failed, by reason.
        inferences: batch rows of the requests answered.
        request_ns: from receipt to answer, nanoseconds of all requests answered.
        queue_ns: of it, waiting for an instance.
        failure_ns: from receipt to refusal, nanoseconds of all requests that failed.
        last_inference_ms: when the last one was answered, milliseconds since 1970; 0: none yet.
        batches: rows of a run to the runs of so many rows.
        latency: of the requests answered, how many took 2^(i - 1) to 2^i - 1 nanoseconds, at index i.
    """

    requests: Compute = field(default_factory=Compute)
    failure: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURE_REASONS, 0))
    inferences: int = 0
    request_ns: int = 0
    queue_ns: int = 0
    failure_ns: int = 0
    last_inference_ms: int = 0
    batches: dict[int, Compute] = field(default_factory=dict)
    latency: list[int] = field(default_factory=lambda: [0] * 64)

    @property
    def executions(self) -> int:
        """Runs of the graph."""
        return sum(batch.count for batch in self.batches.values())


class Statistics:
    """The counts of one model version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def record_run(self, rows: int, calls: Sequence[Call]) -> None:
        """Count one run of the graph and the requests that it answered.

        Args:
            rows: batch rows of all of them.
            calls: theirs, with all times set.
        """
        first = calls[0]
        input_ns = first.ready_ns - first.started_ns
        infer_ns = first.ran_ns - first.ready_ns
        output_ns = first.done_ns - first.ran_ns
        counts = self._counts
        with self._lock:
            counts.inferences += rows
            counts.last_inference_ms = time.time_ns() // 1_000_000
            batch = counts.batches.get(rows)
            if batch is None:
                batch = counts.batches[rows] = Compute()
            batch.add(1, input_ns, infer_ns, output_ns)
            for call in calls:
                request_ns = call.done_ns - call.received_ns
                counts.request_ns += request_ns
                counts.latency[request_ns.bit_length()] += 1
                counts.queue_ns += call.started_ns - call.queued_ns
                # Decoding is part of what the input costs, and each request has its own.
                decode_ns = call.queued_ns - call.received_ns
                counts.requests.add(1, decode_ns + input_ns, infer_ns, output_ns)

    def record_step(self, rows: int, infer_ns: int) -> None:
        """Count one run of a graph that answers a request in many runs.

        Args:
            rows: sequences that it went on with.
            infer_ns: nanoseconds that it took.
        """
        with self._lock:
            batch = self._counts.batches.get(rows)
            if batch is None:
                batch = self._counts.batches[rows] = Compute()
            batch.add(1, 0, infer_ns, 0)

    def record_answer(self, call: Call) -> None:
        """Count one request that many runs have answered.

        Args:
            call: its, with the times when it was received, decoded, taken out of the queue and answered.
        """
        request_ns = call.done_ns - call.received_ns
        counts = self._counts
        with self._lock:
            counts.inferences += 1
            counts.last_inference_ms = time.time_ns() // 1_000_000
            counts.request_ns += request_ns
            counts.latency[request_ns.bit_length()] += 1
            counts.queue_ns += call.started_ns - call.queued_ns
            counts.requests.add(1, call.queued_ns - call.received_ns, call.done_ns - call.started_ns, 0)

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
    requests, failed = counts.requests, sum(counts.failure.values())

    def duration(count: int, nanoseconds: int) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=count, ns=nanoseconds)

    return pb.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=counts.last_inference_ms,
        inference_count=counts.inferences,
        execution_count=counts.executions,
        inference_stats=pb.InferStatistics(
            success=duration(requests.count, counts.request_ns),
            fail=duration(failed, counts.failure_ns),
            queue=duration(requests.count, counts.queue_ns),
            compute_input=duration(requests.count, requests.input_ns),
            compute_infer=duration(requests.count, requests.infer_ns),
            compute_output=duration(requests.count, requests.output_ns),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=duration(batch.count, batch.input_ns),
                compute_infer=duration(batch.count, batch.infer_ns),
                compute_output=duration(batch.count, batch.output_ns),
            )
            for size, batch in sorted(counts.batches.items())
        ],
    )
