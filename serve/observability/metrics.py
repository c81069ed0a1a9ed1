"""The metrics endpoint: GET /metrics over HTTP, for a few clients at a time and none of them for long."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from serve.observability.exposition import exposition
from serve.observability.system_usage import SystemUsage

if TYPE_CHECKING:
    from collections.abc import Callable

    from serve.core import InferenceCore

logger = logging.getLogger(__name__)

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CONNECTIONS = 8
_CONNECTION_SECONDS = 10.0
_CHECK_SECONDS = 0.5
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class MetricsServer(TCPServer):
    """Answers on a bounded number of threads.

    A connection beyond them is refused at once, and one that is too old is cut, however slowly
    its client sends or reads.
    """

    allow_reuse_address = True
    request_queue_size = 16

    def __init__(
        self, address: str, port: int, render: Callable[[], bytes], seconds: float = _CONNECTION_SECONDS
    ) -> None:
        """Bind; `render` makes the answer, and a connection lasts `seconds` at most.

        Raises:
            OSError: the address can't be bound.
        """
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="metrics")
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__((address, port), _handler(render))
        self._loop = threading.Thread(
            target=self.serve_forever, args=(_CHECK_SECONDS,), name="metrics", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that was bound."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Answer from threads until `close`."""
        self._loop.start()

    def close(self) -> None:
        """Answer nothing more, and cut what is open."""
        self.shutdown()
        self.server_close()
        self._cut(before=float("inf"))
        self._threads.shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread, or refuse it."""
        with self._lock:
            full = len(self._open) >= _CONNECTIONS
            if not full:
                self._open[request] = time.monotonic()
        if full:
            with contextlib.suppress(OSError):
                request.setblocking(False)  # noqa: FBT003 - socket's own
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        self._threads.submit(self._answer, request, client_address)

    def service_actions(self) -> None:
        """Called by the loop twice a second: cut the connections that are too old."""
        self._cut(before=time.monotonic() - self._seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a line in the log."""

    def _answer(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            self.handle_error(request, client_address)
        finally:
            with self._lock:
                del self._open[request]
            self.shutdown_request(request)

    def _cut(self, before: float) -> None:
        with self._lock:
            old = [connection for connection, since in self._open.items() if since < before]
        for connection in old:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def start_metrics_server(core: InferenceCore, address: str, port: int) -> MetricsServer:
    """Serve /metrics from threads until the returned server's `close`.

    Raises:
        OSError: the address can't be bound.
    """
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    usage = SystemUsage()
    server = MetricsServer(address, port, lambda: exposition(core, usage).encode() + generate_latest(process))
    server.start()
    return server


def _handler(render: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            try:
                body = render()
            except Exception:
                logger.exception("metrics can't be made")
                self.send_error(500)
                return
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Scrapes are not worth a log line each."""

    return Handler
