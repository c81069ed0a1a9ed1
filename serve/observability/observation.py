"""What a transport tells about a request as it goes: for its trace and its line in the access log.

A transport asks `observer.active` first; where neither is on, that is all that a request costs.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from serve.observability.access_log import AccessRecord
from serve.observability.open_telemetry import PROPAGATION_HEADERS
from serve.request import InferRequest, InferResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serve.observability.access_log import AccessLog
    from serve.observability.tracing import Trace, Tracer
    from serve.request import Call


class Observer:
    """Begins the observation of requests."""

    def __init__(self, tracer: Tracer, access_log: AccessLog | None) -> None:
        self.tracer = tracer
        self.access_log = access_log

    @property
    def active(self) -> bool:
        """Whether anybody wants to know about requests."""
        return self.tracer.active or self.access_log is not None

    def begin(
        self,
        method: str,
        call: Call,
        request_bytes: int,
        peer: str,
        metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> Observed:
        """A request has been received.

        Args:
            method: the RPC's name.
            call: the request's.
            request_bytes: size of its message.
            peer: the client's address, as the transport names it.
            metadata: the request's headers.
        """
        record = AccessRecord(method, call, peer, request_bytes)
        parent: Mapping[str, str] = {}
        if self.tracer.follows_clients and self.tracer.active:
            headers = ((key, value) for key, value in metadata or () if key in PROPAGATION_HEADERS)
            parent = {key: value for key, value in headers if isinstance(value, str)}
        return Observed(self, record, parent)

    def close(self) -> None:
        """Write what waits; takes some seconds at most."""
        self.tracer.close()
        if self.access_log is not None:
            self.access_log.close()


class Observed:
    """One request under observation.

    What is known is written when both have happened: it was answered or refused, and its RPC is over. A
    client that goes away makes the second come first, on another thread.
    """

    def __init__(self, observer: Observer, record: AccessRecord, parent: Mapping[str, str]) -> None:
        self._observer = observer
        self._record = record
        self._parent = parent
        self._trace: Trace | None = None
        self._request: InferRequest | None = None
        self._answered_ns = 0
        self._lock = threading.Lock()

    def parsed(self, request: Any) -> None:
        """The request has been decoded: an InferRequest, or another RPC's message."""
        record = self._record
        if not isinstance(request, InferRequest):
            record.model = _model_of(request)
            return
        record.model, record.version, record.request_id = (
            request.model_name, request.model_version, request.id,
        )  # fmt: skip
        if self._observer.tracer.active:
            self._trace = self._observer.tracer.sample(request.model_name, self._parent)
            self._request = request if self._trace else None

    def answered(self, response: Any, response_bytes: int) -> None:
        """The answer is encoded: the InferResponse, or another RPC's message."""
        self._record.code, self._record.response_bytes = "OK", response_bytes
        if isinstance(response, InferResponse):
            self._record.version = response.model_version
        self._end(response)

    def failed(self, code: str, message: str) -> None:
        """The request is refused or has failed, with a gRPC status and its message."""
        self._record.code, self._record.error = code, message
        self._end(f"{code}: {message}")

    def finish(self) -> None:
        """The RPC is over: answered and sent, cancelled or expired. Only the first call counts."""
        with self._lock:
            if self._record.ended_ns:
                return
            self._record.ended_ns = time.monotonic_ns()
            answered = self._answered_ns > 0
        if answered:
            self._write()

    def _end(self, answer: Any) -> None:
        if self._trace is not None and self._request is not None:
            self._trace.answer(self._request, answer)
            self._request = None
        with self._lock:
            first = not self._answered_ns
            self._answered_ns = time.monotonic_ns()
            over = self._record.ended_ns > 0
        if first and over:
            self._write()

    def _write(self) -> None:
        record = self._record
        if self._trace is not None:
            self._trace.finish(record.call, (self._answered_ns, max(record.ended_ns, self._answered_ns)))
        if self._observer.access_log is not None:
            self._observer.access_log.record(record)


def _model_of(message: Any) -> str:
    """The model that a protocol message names, if its kind names any."""
    fields = message.DESCRIPTOR.fields_by_name
    name = next((name for name in ("model_name", "name") if name in fields), None)
    return str(getattr(message, name)) if name else ""
