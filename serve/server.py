"""The gRPC transport: start, serve, drain, stop."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from serve import __version__
from serve.core import InferenceCore
from serve.errors import CanceledError, InternalError, ModelLoadError, ServeError, UnsupportedError
from serve.health import publish
from serve.metrics import start_metrics_server
from serve.reflection import add_reflection
from serve.repository import Repository
from serve.request import Call
from serve.servicer import METHODS, RPCS, SERVICE, Method
from serve.settings import SettingsError, parse_server_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from http.server import ThreadingHTTPServer

    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

# Beside the threads that hold requests in flight: some to refuse the next ones, and for health and metadata.
_SPARE_THREADS = 4
_LEAST_REQUEST_LIMIT = 64 << 20
_MESSAGE_SLACK = 1 << 20
_USAGE_ERROR = 2


class Server:
    """The whole server: repository, gRPC endpoint, metrics endpoint.

    `start` returns when both endpoints answer; `stop` drains.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._repository = Repository(settings.model_repository, settings.max_image_pixels)
        self._core = InferenceCore(settings, self._repository)
        self._health = health.HealthServicer()
        self._metrics: ThreadingHTTPServer | None = None
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
        if settings.exit_on_error and not all(model.ready for model in self._repository.models):
            raise ModelLoadError(
                "a model could not be loaded, see above; --exit-on-error=false serves the rest"
            )
        self._grpc = self._build()
        self.grpc_port = self._grpc.add_insecure_port(_host_port(settings.grpc_address, settings.grpc_port))
        if settings.allow_metrics:
            self._metrics = start_metrics_server(
                self._repository, settings.metrics_address, settings.metrics_port
            )
            self.metrics_port = self._metrics.server_address[1]
        publish(self._core, self._health)
        self._grpc.start()

    def stop(self) -> bool:
        """Drain and stop; returns whether every request in flight could finish.

        The order matters: balancers look at health and stop sending; then new requests are refused with
        UNAVAILABLE, which clients retry elsewhere; then what is in flight finishes; then the port closes.
        """
        self._health.enter_graceful_shutdown()
        drained = self._core.admission.close(self._settings.exit_timeout_secs)
        # Watch and reflection streams never end by themselves, so they get no grace of their own.
        self._grpc.stop(grace=None).wait()
        if drained:
            self._repository.close()
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()
        return drained

    def report(self) -> str:
        """A table of the models and their states, as Triton prints one."""
        rows = [("Model", "Version", "Status")]
        for model in self._repository.models:
            rows += [(model.name, str(number), "READY") for number in model.versions]
            rows += [
                (model.name, str(number or ""), f"UNAVAILABLE: {problem}")
                for number, problem in model.problems.items()
            ]
        widths = [max(len(row[column]) for row in rows) for column in range(2)] + [0]
        lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _build(self) -> grpc.Server:
        settings = self._settings
        limit = settings.max_request_bytes or _largest_request(self._repository)
        server = grpc.server(
            ThreadPoolExecutor(settings.max_inflight_requests + _SPARE_THREADS, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(settings.reuse_grpc_port)),
                # More than this at once would be refused anyway, and a client that opens and resets streams
                # as fast as it can is held to it.
                ("grpc.max_concurrent_streams", settings.max_inflight_requests),
            ],
        )
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(_unary(self._core, name, METHODS[name]))
            if name in METHODS
            else grpc.stream_stream_rpc_method_handler(_unimplemented(name))
            for name in RPCS
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, (SERVICE, health.SERVICE_NAME))
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
        where = _host_port(address, port)
        raise OSError(f"{where} ({flag}) can't be had: {error.strerror or error}") from error


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _largest_request(repository: Repository) -> int:
    """Bytes of the largest request that the models' declared shapes allow, and slack for the rest of it."""
    largest = max((version.config.request_bytes for version in repository), default=0)
    return max(largest + _MESSAGE_SLACK, _LEAST_REQUEST_LIMIT)


def _unary(core: InferenceCore, name: str, method: Method) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """A gRPC handler over raw bytes: protobuf's parse errors, too, become a status of ours."""

    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        remaining = context.time_remaining()
        call = Call(None if remaining is None else time.monotonic() + remaining)
        try:
            if method.counted:
                _admit(core, context, call)
            return method.serialize(method.handle(core, method.parse(data), call).result())
        except ServeError as error:
            _abort(context, name, error)
        except CancelledError:
            _abort(context, name, CanceledError("the request was cancelled while it waited"))
        except Exception as error:
            logger.exception("%s failed", name)
            _abort(context, name, InternalError(f"{name}: {error!r}"))

    return answer


def _unimplemented(name: str) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
    """A handler of any arity that says which RPC is missing; gRPC's own answer is "Method not found!"."""

    def answer(_requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        _abort(context, name, UnsupportedError(f"{name} is not implemented by onnxedge {__version__}"))

    return answer


def _admit(core: InferenceCore, context: grpc.ServicerContext, call: Call) -> None:
    """Let a request in until gRPC says that it is over: answered and on the wire, cancelled, or expired."""
    core.admission.enter()

    def end() -> None:
        call.cancel()
        core.admission.leave()

    if not context.add_callback(end):
        end()


def _abort(context: grpc.ServicerContext, name: str, error: ServeError) -> NoReturn:
    logger.debug("%s: %s: %s", name, error.code, error)
    context.abort(grpc.StatusCode[error.code], str(error))


def main(arguments: Sequence[str]) -> int:
    """`onnxedge serve`: serve until SIGTERM or SIGINT; 0 when every request in flight was answered."""
    try:
        settings = parse_server_settings(arguments)
    except SettingsError as error:
        print(f"onnxedge serve: {error}", file=sys.stderr)
        return _USAGE_ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("serve").setLevel(logging.DEBUG if settings.log_verbose else logging.INFO)
    stopping = _on_signals()
    server = Server(settings)
    try:
        server.start()
    except (ModelLoadError, OSError, RuntimeError) as error:
        logger.error("cannot start: %s", error)  # noqa: TRY400 - the message says it all
        return 1
    _announce(server, settings)
    stopping.wait()
    logger.info("stopping: requests in flight get up to %d s", settings.exit_timeout_secs)
    return 0 if server.stop() else 1


def _on_signals() -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; the second one ends the process without a drain.

    As process 1 of a container, Python would ignore both.
    """
    stopping = threading.Event()

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return stopping


def _announce(server: Server, settings: ServerSettings) -> None:
    print(server.report(), file=sys.stderr, flush=True)
    if settings.allow_metrics:
        logger.info("metrics at http://%s/metrics", _host_port(settings.metrics_address, server.metrics_port))
    logger.info("SERVING: gRPC at %s", _host_port(settings.grpc_address, server.grpc_port))
