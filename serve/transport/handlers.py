"""The protocol's table on grpcio: one handler per RPC, raw bytes in and out."""

from __future__ import annotations

import logging
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, NoReturn

import grpc

from serve.errors import CanceledError, InternalError, InvalidArgumentError, ServeError
from serve.request import Call
from serve.rpc.servicer import METHODS, STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serve.core import InferenceCore
    from serve.observability.observation import Observed
    from serve.rpc.servicer import Method

logger = logging.getLogger(__name__)


def method_handlers(core: InferenceCore) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
    """A handler for each RPC of the protocol, by its name.

    Without gRPC's deserializers: protobuf's parse errors, too, become a status of ours.
    """
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.unary_unary_rpc_method_handler(_unary(core, name, method))
        for name, method in METHODS.items()
    }
    return {**handlers, STREAM: grpc.stream_stream_rpc_method_handler(_stream(core))}


def _unary(core: InferenceCore, name: str, method: Method) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        remaining = context.time_remaining()
        call = Call(None if remaining is None else time.monotonic() + remaining)
        observed = _observe(core, name, call, data, context) if core.observer.active else None
        try:
            _check(core, name, method, len(data))
            if method.admits(len(data)):
                _admit(core, context, call, len(data))
            request = method.parse(data)
            if observed is None:
                return method.serialize(method.handle(core, request, call).result())
            observed.parsed(request)
            response = method.handle(core, request, call).result()
            body = method.serialize(response)
            observed.answered(response, len(body))
        except Exception as caught:  # noqa: BLE001 - each becomes a status
            error = _serve_error(name, caught)
            if observed is not None:
                observed.failed(error.code, str(error))
            # Its frames hold the request, and the request's future holds it: a cycle, of megabytes.
            caught.__traceback__ = error.__traceback__ = None
            _abort(context, name, error)
        return body

    return answer


def _stream(core: InferenceCore) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
    def answers(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        try:
            stream = core.streams.open(
                core, deadline, context.peer(), context.invocation_metadata(), context.cancel
            )
            if context.add_callback(stream.close):
                yield from stream.answers(requests)
            else:
                stream.close()
        except ServeError as error:
            error.__traceback__ = None  # as above
            _abort(context, STREAM, error)

    return answers


def _observe(
    core: InferenceCore, name: str, call: Call, data: bytes, context: grpc.ServicerContext
) -> Observed:
    observed = core.observer.begin(name, call, len(data), context.peer(), context.invocation_metadata())
    if not context.add_callback(observed.finish):
        observed.finish()
    return observed


def _check(core: InferenceCore, name: str, method: Method, size: int) -> None:
    """Refuse a request for what is known without parsing it."""
    if size > method.largest:
        raise InvalidArgumentError(f"{name}: the request has {size} bytes, expected {method.largest} at most")
    if method.check is not None:
        method.check(core)


def _admit(core: InferenceCore, context: grpc.ServicerContext, call: Call, size: int) -> None:
    """Let a request in until gRPC says that it is over: answered and on the wire, cancelled, or expired."""
    core.admission.enter(size)

    def end() -> None:
        try:
            call.cancel()
        finally:
            core.admission.leave(size)

    if not context.add_callback(end):
        end()


def _serve_error(name: str, error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if isinstance(error, CancelledError):
        return CanceledError("the request was cancelled while it waited")
    logger.error("%s failed", name, exc_info=error)
    return InternalError(f"{name}: {error!r}")


def _abort(context: grpc.ServicerContext, name: str, error: ServeError) -> NoReturn:
    logger.debug("%s: %s: %s", name, error.code, error)
    context.abort(grpc.StatusCode[error.code], str(error))
