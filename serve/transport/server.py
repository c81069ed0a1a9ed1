"""The gRPC transport: start, serve, drain, stop."""

from __future__ import annotations

import errno
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE

from serve.core import InferenceCore
from serve.errors import ModelLoadError
from serve.model_repository.repository import MOST_CHANGES, Repository
from serve.observability.metrics import start_metrics_server
from serve.rpc.servicer import SERVICE
from serve.transport.channel_options import channel_options
from serve.transport.connections import hang_up
from serve.transport.handlers import method_handlers
from serve.transport.health import Health, publish
from serve.transport.reflection import MOST_REFLECTIONS, add_reflection
from serve.transport.security import Security

if TYPE_CHECKING:
    from serve.observability.log_settings import LogSettings
    from serve.observability.metrics import MetricsServer
    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

# Beside the threads that hold requests in flight: some to refuse the next ones, and for health and metadata.
_SPARE_THREADS = 4
_LEAST_REQUEST_LIMIT = 64 << 20
_MESSAGE_SLACK = 1 << 20
# For the last status of a stream to get onto the wire.
_LAST_STATUS_SECONDS = 1.0


class Server:
    """The whole server: repository, gRPC endpoint, metrics endpoint.

    `start` returns when both endpoints answer; `stop` drains.
    """

    def __init__(self, settings: ServerSettings, log: LogSettings | None = None) -> None:
        """Prepare to serve.

        Raises:
            SettingsError: certificates, tokens, traces or logs can't be as the settings say.
        """
        self._settings = settings
        self._security = Security(settings)
        self._repository = Repository(settings)
        self._core = InferenceCore(settings, self._repository, log)
        self._health = Health()
        self._metrics: MetricsServer | None = None
        self._grpc: grpc.Server
        self.grpc_port = 0
        self.metrics_port = 0

    def start(self) -> None:
        """Load the models and answer.

        Raises:
            ModelLoadError: the repository can't be read, or a model can't be loaded and exit_on_error is set.
            OSError, RuntimeError: an endpoint's address can't be bound.
        """
        settings = self._settings
        if not settings.reuse_grpc_port:
            _require_free("--grpc-port", settings.grpc_address, settings.grpc_port)
        if settings.allow_metrics:
            _require_free("--metrics-port", settings.metrics_address, settings.metrics_port)
        self._repository.load()
        if settings.exit_on_error and not self._repository.all_ready():
            raise ModelLoadError(
                "a model could not be loaded, see above; --exit-on-error=false serves the rest"
            )
        self._grpc = self._build()
        self.grpc_port = self._security.add_port(self._grpc)
        if settings.allow_metrics:
            self._metrics = start_metrics_server(self._core, settings.metrics_address, settings.metrics_port)
            self.metrics_port = self._metrics.port
        self._repository.on_change = lambda: publish(self._core, self._health)
        publish(self._core, self._health)
        self._grpc.start()

    def stop(self) -> bool:
        """Drain and stop; returns whether every request in flight could finish.

        The order matters: balancers look at health and stop sending; then new requests are refused with
        UNAVAILABLE, which clients retry elsewhere; then what is in flight finishes; then the port closes.
        """
        self._health.drain()
        self._core.streams.drain()
        end = time.monotonic() + self._settings.exit_timeout_secs
        drained = self._core.admission.close(self._settings.exit_timeout_secs)
        # Answers that a stream's client has yet to take hold no place in the admission.
        self._core.streams.wait(max(end - time.monotonic(), _LAST_STATUS_SECONDS))
        # New calls are refused by now; gRPC's stop alone would reset those that race with it, which their
        # clients see as CANCELLED. Watch and reflection streams never end by themselves and get no grace.
        hang_up(self.grpc_port, _LAST_STATUS_SECONDS)
        self._grpc.stop(grace=None).wait()
        if drained:
            self._core.close()
        self._core.observer.close()
        if self._metrics is not None:
            self._metrics.close()
        return drained

    def report(self) -> str:
        """A table of the models and their states, as Triton prints one."""
        rows = [("Model", "Version", "Status")]
        for state in self._repository.index():
            status = f"{state.state}: {state.reason}" if state.reason else state.state
            rows.append((state.name, state.version, status))
        widths = [max(len(row[column]) for row in rows) for column in range(2)] + [0]
        lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def reopen_logs(self) -> None:
        """Open the access log's file anew, after it was rotated."""
        if self._core.access_log is not None:
            self._core.access_log.reopen()

    def _build(self) -> grpc.Server:
        settings = self._settings
        # Each of these may hold one for long.
        held = settings.max_inflight_requests + settings.max_streams + MOST_CHANGES + MOST_REFLECTIONS
        server = grpc.server(
            ThreadPoolExecutor(held + _SPARE_THREADS, thread_name_prefix="grpc"),
            interceptors=self._security.interceptors,
            options=channel_options(settings, _largest_request(self._repository)),
        )
        handlers = method_handlers(self._core)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, (SERVICE, HEALTH_SERVICE))
        return server


def _require_free(flag: str, address: str, port: int) -> None:
    """Find a taken port before the models load, and say which; gRPC's own message names none.

    Raises:
        OSError: the address can't be bound.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            flag = flag.replace("-port", "-address")
        where = host_port(address, port)
        raise OSError(f"{where} ({flag}) can't be had: {error.strerror or error}") from error


def host_port(address: str, port: int) -> str:
    """An address as clients write it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _largest_request(repository: Repository) -> int:
    """Bytes of the largest request that the models' declared shapes allow, and slack for the rest of it."""
    largest = max((version.config.request_bytes for version in repository), default=0)
    return max(largest + _MESSAGE_SLACK, _LEAST_REQUEST_LIMIT)
