"""Prometheus metrics under Triton's names, written from the exact statistics when they are asked for.

The text is written here, not by prometheus-client, because that appends `_total` to every counter's name and
Triton's counters have none; the process's own figures (memory, CPU, file descriptors) do come from it.
Format: Prometheus text exposition 0.0.4.
"""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from serve.statistics import FAILURE_REASONS, Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from serve.model import ModelVersion
    from serve.repository import Repository

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_TIMEOUT_SECONDS = 10

# Name, help and value of each counter; durations are kept in nanoseconds and published in microseconds.
_COUNTERS: tuple[tuple[str, str, Callable[[Counts], int]], ...] = (
    ("nv_inference_request_success", "Requests answered", lambda c: c.success),
    ("nv_inference_count", "Batch rows inferred", lambda c: c.inferences),
    ("nv_inference_exec_count", "Runs of the model", lambda c: c.compute().executions),
    ("nv_inference_request_duration_us", "From receipt to answer", lambda c: c.request_ns // 1000),
    ("nv_inference_queue_duration_us", "Waiting for an instance", lambda c: c.queue_ns // 1000),
    ("nv_inference_compute_input_duration_us", "Decoding inputs", lambda c: c.compute().input_ns // 1000),
    ("nv_inference_compute_infer_duration_us", "Running the model", lambda c: c.compute().infer_ns // 1000),
    ("nv_inference_compute_output_duration_us", "Making outputs", lambda c: c.compute().output_ns // 1000),
)


def exposition(repository: Repository) -> str:
    """The metrics of every ready version as Prometheus text."""
    versions = [(version, version.statistics.snapshot()) for version in repository]
    lines: list[str] = []
    for name, text, value in _COUNTERS:
        unit = ", cumulative microseconds" if name.endswith("_us") else ""
        lines += _family(name, "counter", text + unit, [(_labels(v), value(c)) for v, c in versions])
    failures = [
        (_labels(version, reason=reason), counts.failure[reason])
        for version, counts in versions
        for reason in FAILURE_REASONS
    ]
    lines += _family("nv_inference_request_failure", "counter", "Requests that failed, by reason", failures)
    pending = [(_labels(version), version.pending) for version, _ in versions]
    lines += _family("nv_inference_pending_request_count", "gauge", "Requests that wait", pending)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, int]]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(f"{name}{{{k}}} {v}" for k, v in samples)]


def _labels(version: ModelVersion, **more: str) -> str:
    pairs = {"model": version.name, "version": str(version.version), **more}
    return ",".join(f'{key}="{_escape(value)}"' for key, value in pairs.items())


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def start_metrics_server(repository: Repository, address: str, port: int) -> ThreadingHTTPServer:
    """Serve /metrics from a thread until the returned server's `shutdown`.

    Raises:
        OSError: the address can't be bound.
    """
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    handler = _handler(lambda: exposition(repository).encode() + generate_latest(process))
    server = (_IPv6Server if ":" in address else ThreadingHTTPServer)((address, port), handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _handler(render: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = render()
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Scrapes are not worth a log line each."""

    return Handler
