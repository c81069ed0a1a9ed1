"""Traces of single requests: which are taken, what is in one, and where it goes.

A request that isn't sampled costs a lock and an addition, and where tracing is off an `if`. The writing, to
Triton's JSON files or to an OpenTelemetry collector, is a thread's.
"""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve.observability.open_telemetry import OpenTelemetrySpans
from serve.observability.trace_config import parse_trace_config
from serve.observability.trace_file import TraceFile
from serve.observability.trace_settings import (
    OPEN_TELEMETRY,
    TENSORS,
    TIMESTAMPS,
    TraceSettings,
    describe,
    parse_changes,
)
from serve.observability.write_behind import Sink, WriteBehind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from serve.observability.trace_settings import TraceConfig, TraceScope
    from serve.request import Call, InferRequest, InferResponse, Tensor

logger = logging.getLogger(__name__)

_WAITING_TRACES = 1024
# Of each tensor; the shape tells what was left out.
_MOST_VALUES = 1024
_LONGEST_TEXT = 256


@dataclass(slots=True)
class TensorSample:
    """The first values of a tensor, copied.

    Attributes:
        activity: TENSOR_QUEUE_INPUT or TENSOR_BACKEND_OUTPUT.
        values: in row-major order, 1024 at most; of BYTES, 256 bytes each at most.
    """

    activity: str
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


@dataclass(slots=True)
class TraceRecord:
    """One trace, ready to write.

    Attributes:
        id: counts the traces of this process from 1.
        model_version: as served; -1: none was.
        stamps: (Triton's name, `time.monotonic_ns()`), in order of time.
        parent: the client's `traceparent` and `tracestate` headers, in OpenTelemetry's mode.
        error: gRPC status and message of a request that failed; empty: it didn't.
        log_frequency: as the settings said when the request came.
    """

    id: int
    model_name: str
    model_version: int
    request_id: str
    log_frequency: int
    stamps: list[tuple[str, int]] = field(default_factory=list)
    tensors: list[TensorSample] = field(default_factory=list)
    parent: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


class Tracer:
    """Samples requests and writes their traces."""

    def __init__(self, flags: Iterable[str]) -> None:
        """Read the flags of `--trace-config`; a thread starts only where something is to be written.

        Raises:
            SettingsError: a flag can't be used, or OpenTelemetry is not installed.
        """
        self._settings = TraceSettings(parse_trace_config(flags))
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self.follows_clients = self.config.mode == OPEN_TELEMETRY
        """Whether a client's `traceparent` header has its request traced."""
        self._sink: Sink[TraceRecord] = (
            OpenTelemetrySpans(self.config) if self.follows_clients else TraceFile(self.config.file)
        )
        self._writer: WriteBehind[TraceRecord] | None = None
        self.active = self._settings.active
        """Whether any request could be traced now; nothing else need be asked where not."""
        if self.config.defaults.level and not self.active:
            where = "url=URL" if self.follows_clients else "triton,file=PATH"
            logger.warning("nothing is traced: --trace-config needs %s and rate=N, and no count=0", where)

    @property
    def config(self) -> TraceConfig:
        """What the command line said."""
        return self._settings.config

    @property
    def dropped(self) -> int:
        """How many traces were lost because they came faster than they could be written."""
        return self._writer.dropped if self._writer else 0

    def sample(self, model_name: str, parent: Mapping[str, str] | None = None) -> Trace | None:
        """Count a request; its trace if it is to have one.

        Args:
            model_name: as the request names it.
            parent: its `traceparent` and `tracestate` headers, where `follows_clients`.
        """
        with self._lock:
            scope = self._settings.take(model_name, forced=bool(parent))
            self.active = self._settings.active
            if scope is None:
                return None
            if self._writer is None:
                self._writer = WriteBehind("traces", self._sink, _WAITING_TRACES)
        return Trace(self._writer, next(self._ids), scope, parent or {})

    def update(self, model: str, settings: Mapping[str, Sequence[str]]) -> None:
        """Change the settings of a model, or the global ones for `""`.

        Args:
            model: one that there is.
            settings: by the protocol's names; one without values is cleared.

        Raises:
            InvalidArgumentError: a setting is unknown, or its value can't be used.
            UnsupportedError: a setting can't be changed while the server runs.
        """
        changes = parse_changes(settings, self.config.mode)
        with self._lock:
            self._settings.update(model, changes)
            self.active = self._settings.active

    def describe(self, model: str) -> dict[str, list[str]]:
        """The settings in force for a model, or the global ones for `""`, by the protocol's names."""
        with self._lock:
            return describe(self._settings.scope(model), self.config)

    def close(self) -> None:
        """Write what waits; takes some seconds at most."""
        with self._lock:
            self.active = False
            writer = self._writer
        if writer is not None:
            writer.close()


class Trace:
    """The trace of one request while it is in the server."""

    def __init__(
        self, writer: WriteBehind[TraceRecord], number: int, scope: TraceScope, parent: Mapping[str, str]
    ) -> None:
        self._writer = writer
        self._level = scope.level
        self._record = TraceRecord(number, "", -1, "", scope.log_frequency, parent=parent)

    def answer(self, request: InferRequest, answer: InferResponse | str) -> None:
        """Note what the request was and what became of it, while its tensors are at hand.

        Args:
            request: as the model took it.
            answer: the model's, or the gRPC status and message that it was refused with.
        """
        record = self._record
        record.model_name, record.request_id = request.model_name, request.id
        version = request.model_version
        if isinstance(answer, str):
            record.error = answer
        else:
            version = answer.model_version
        record.model_version = int(version) if version.isascii() and version.isdecimal() else -1
        if TENSORS in self._level:
            record.tensors = _samples("TENSOR_QUEUE_INPUT", request.inputs)
            if not isinstance(answer, str):
                record.tensors += _samples("TENSOR_BACKEND_OUTPUT", answer.outputs)

    def finish(self, call: Call, sent_ns: tuple[int, int] | None = None) -> None:
        """Hand the trace over to be written.

        Args:
            call: the request's times.
            sent_ns: `time.monotonic_ns()` when the answer was handed to the transport and when it had left;
                None: not known.
        """
        if TIMESTAMPS in self._level:
            self._record.stamps = _stamps(call, sent_ns)
        self._writer.put(self._record)


def _stamps(call: Call, sent_ns: tuple[int, int] | None) -> list[tuple[str, int]]:
    """Triton's names for a call's times; a request's message is whole before its handler starts."""
    named = [
        ("GRPC_WAITREAD_START", call.received_ns),
        ("GRPC_WAITREAD_END", call.received_ns),
        ("REQUEST_START", call.received_ns),
        ("QUEUE_START", call.queued_ns),
    ]
    if call.done_ns:
        named += [
            ("COMPUTE_START", call.started_ns),
            ("COMPUTE_INPUT_END", call.ready_ns),
            ("COMPUTE_OUTPUT_START", call.ran_ns),
            ("COMPUTE_END", call.done_ns),
            ("INFER_RESPONSE_COMPLETE", call.done_ns),
        ]
    ended = call.done_ns or (sent_ns[0] if sent_ns else call.queued_ns)
    named.append(("REQUEST_END", ended))
    if sent_ns:
        named += [("GRPC_SEND_START", sent_ns[0]), ("GRPC_SEND_END", sent_ns[1])]
    return named


def _samples(activity: str, tensors: Iterable[Tensor]) -> list[TensorSample]:
    found = []
    for tensor in tensors:
        values = tensor.array.flat[:_MOST_VALUES].tolist()
        if tensor.datatype.name == "BYTES":
            values = [_cut(value) for value in values]
        elif tensor.datatype.name == "FP32":
            # The shortest text that reads back as the same float32, not as its float64.
            values = [str(value) for value in tensor.array.flat[:_MOST_VALUES]]
        found.append(TensorSample(activity, tensor.name, tensor.datatype.name, tensor.array.shape, values))
    return found


def _cut(value: bytes | str) -> bytes:
    return value[:_LONGEST_TEXT] if isinstance(value, bytes) else value[:_LONGEST_TEXT].encode()
