"""Traces as OpenTelemetry spans, sent to a collector by OTLP over HTTP (Triton's trace mode opentelemetry).

Triton's three spans, InferRequest around the model's around compute, and one more for the time in the queue;
its timestamps are their events. opentelemetry-sdk batches and sends in a thread of its own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from opentelemetry.sdk.trace.export import SpanExporter

    from serve.observability.trace_settings import TraceConfig
    from serve.observability.tracing import TraceRecord

PROPAGATION_HEADERS = ("traceparent", "tracestate")
"""Request headers that carry a client's trace (W3C Trace Context)."""

_SERVICE = "onnxedge"
# Of one request to the collector.
_EXPORT_SECONDS = 4.0
# Which span an event belongs to.
_ROOT = (
    "GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "INFER_RESPONSE_COMPLETE", "GRPC_SEND_START", "GRPC_SEND_END",
)  # fmt: skip
_MODEL = ("REQUEST_START", "QUEUE_START", "REQUEST_END")
_COMPUTE = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")


class OpenTelemetrySpans:
    """Makes spans of traces and has them sent."""

    def __init__(self, config: TraceConfig, exporter: SpanExporter | None = None) -> None:
        """Set the sending up; nothing is sent yet.

        Args:
            config: the command line's, with the collector's URL and the batching.
            exporter: what sends, None: OTLP over HTTP.

        Raises:
            SettingsError: OpenTelemetry is not installed, or an option can't be used.
        """
        try:
            from opentelemetry import trace  # noqa: PLC0415 - an optional package
            from opentelemetry.exporter.otlp.proto.http import trace_exporter  # noqa: PLC0415 - the same
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - the same
            from opentelemetry.sdk.trace import TracerProvider, export  # noqa: PLC0415 - the same
            from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415 - the same
        except ImportError as error:
            raise SettingsError(
                f"--trace-config mode=opentelemetry needs OpenTelemetry ({error}): "
                "pip install 'onnxedge[tracing]', in a checkout '.[tracing]'"
            ) from error
        self._api = trace
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        # Without SDK's own handler at exit, which would wait 30 s for a collector that is gone.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": _SERVICE, **config.resource}), shutdown_on_exit=False
        )
        url = config.options.get("url")
        exporter = exporter or trace_exporter.OTLPSpanExporter(endpoint=url, timeout=_EXPORT_SECONDS)
        try:
            processor = export.BatchSpanProcessor(
                exporter,
                max_queue_size=_positive(config, "bsp_max_queue_size"),
                schedule_delay_millis=_positive(config, "bsp_schedule_delay"),
                max_export_batch_size=_positive(config, "bsp_max_export_batch_size"),
            )
        except ValueError as error:
            raise SettingsError(f"--trace-config opentelemetry: {error}") from error
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("triton-server")

    def write(self, records: Sequence[TraceRecord]) -> None:
        """Make spans; they are sent later."""
        # The spans' times are on the clock of the day, which may have been set since the last batch.
        clock_offset = time.time_ns() - time.monotonic_ns()
        for record in records:
            self._write(record, {name: at + clock_offset for name, at in record.stamps})

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def _write(self, record: TraceRecord, times: dict[str, int]) -> None:
        if not times:
            return
        parent = self._propagator.extract(dict(record.parent))
        kind = self._api.SpanKind.SERVER
        root = self._tracer.start_span("InferRequest", parent, kind, start_time=min(times.values()))
        inside = self._api.set_span_in_context(root, parent)
        model = self._tracer.start_span(
            record.model_name, inside, kind, _attributes(record), start_time=times["REQUEST_START"]
        )
        within_model = self._api.set_span_in_context(model, inside)
        queue_end = times.get("COMPUTE_START", times["REQUEST_END"])
        queue = self._tracer.start_span("queue", within_model, kind, start_time=times["QUEUE_START"])
        queue.end(max(queue_end, times["QUEUE_START"]))
        if "COMPUTE_START" in times:
            begun = times["COMPUTE_START"]
            compute = self._tracer.start_span("compute", within_model, kind, start_time=begun)
            _add_events(compute, _COMPUTE, times)
            compute.end(times["COMPUTE_END"])
        if record.error:
            for span in (root, model):
                span.set_status(self._api.StatusCode.ERROR, record.error)
        _add_events(model, _MODEL, times)
        model.end(times["REQUEST_END"])
        _add_events(root, _ROOT, times)
        root.end(max(times.values()))


def _attributes(record: TraceRecord) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "triton.model_name": record.model_name,
        "triton.model_version": record.model_version,
        "triton.trace_id": record.id,
        "triton.trace_parent_id": 0,
    }
    if record.request_id:
        attributes["triton.request_id"] = record.request_id
    return attributes


def _add_events(span: Any, names: Iterable[str], times: dict[str, int]) -> None:
    for name in names:
        if name in times:
            span.add_event(name, timestamp=times[name])


def _positive(config: TraceConfig, name: str) -> int | None:
    """An option's number; None: OpenTelemetry's own environment variable or default.

    Raises:
        SettingsError: it is none.
    """
    text = config.options.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise SettingsError(f"--trace-config opentelemetry,{name}={text}: expected a whole number above 0")
    return int(text)
