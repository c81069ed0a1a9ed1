"""grpc.health.v1: the server's state under "" and its service name, each model's under the model's name.

Under its own name health says whether the process answers at all, whatever became of the models: what would
restart a server (a liveness probe of Kubernetes) asks for that, for a new start mends no model.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1.health import SERVICE_NAME
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from serve.rpc.servicer import SERVICE

if TYPE_CHECKING:
    from collections.abc import Callable

    from serve.core import InferenceCore

logger = logging.getLogger(__name__)

# A client that doesn't take an answer of some bytes for so long is cut off: others wait behind it.
_SEND_SECONDS = 1.0


class Health(HealthServicer):
    """States that can be asked for and watched; no client's watch holds up another client's question.

    gRPC returns from the sending of a watch's answer when it is written, which may be never: a client can
    close its HTTP/2 window. grpcio's own servicer sends under the lock that every question takes, so that one
    such client, or two that begin and end watches, stopped health or the whole server. Here one thread sends,
    and holds nothing meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, Any] = {}
        self._watches: dict[str, list[Callable[[Any], None]]] = {}
        self._draining = False
        self._to_do: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._send, name="watches", daemon=True).start()

    def Check(  # noqa: N802 # gRPC's name
        self, request: HealthCheckRequest, context: grpc.ServicerContext
    ) -> HealthCheckResponse:
        """The state of a service, or NOT_FOUND."""
        with self._lock:
            state = self._states.get(request.service)
        if state is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"health knows no service named {request.service!r}")
        return HealthCheckResponse(status=state)

    # Its last argument is what the attribute below asks gRPC for.
    def Watch(  # type: ignore[override] # noqa: N802 # gRPC's name
        self, request: HealthCheckRequest, context: Any, send_response_callback: Callable[..., None]
    ) -> None:
        """The state of a service now, and again whenever it changes; SERVICE_UNKNOWN where there is none."""

        def tell(state: Any) -> None:
            self._to_do.put(partial(_answer, context, send_response_callback, state))

        def end() -> None:
            with self._lock:
                watches = self._watches[request.service]
                watches.remove(tell)
                if not watches:
                    del self._watches[request.service]
            self._to_do.put(partial(send_response_callback, None))

        with self._lock:
            tell(self._states.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN))
            self._watches.setdefault(request.service, []).append(tell)
        if not context.add_callback(end):  # it has ended already
            end()

    # gRPC calls it with a function that sends, and doesn't keep a thread for as long as it lasts.
    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def set(self, service: str, state: Any) -> None:
        """Change a state and tell those who watch it; the state of a server that drains stays."""
        with self._lock:
            if not self._draining:
                self._change(service, state)

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on; returns when those who watch have been told, or soon."""
        with self._lock:
            self._draining = True
            for service in self._states:
                self._change(service, HealthCheckResponse.NOT_SERVING)
        told = threading.Event()
        self._to_do.put(told.set)
        told.wait(_SEND_SECONDS)

    def _change(self, service: str, state: Any) -> None:
        if self._states.get(service) != state:
            self._states[service] = state
            for tell in self._watches.get(service, []):
                tell(state)

    def _send(self) -> None:
        while True:
            try:
                self._to_do.get()()
            except Exception:
                logger.exception("an answer to a health watch could not be sent")


def _answer(context: Any, send: Callable[[HealthCheckResponse], None], state: Any) -> None:
    cut_off = threading.Timer(_SEND_SECONDS, context.cancel)
    cut_off.start()
    try:
        send(HealthCheckResponse(status=state))
    finally:
        cut_off.cancel()


def publish(core: InferenceCore, health: Health) -> None:
    """Tell the health service what the core says of itself and of its models now."""
    states = dict.fromkeys(("", SERVICE), core.is_ready())
    states[SERVICE_NAME] = core.is_live()
    states |= {model.name: bool(model.versions) for model in core.repository.models}
    for name, serving in states.items():
        health.set(name, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)
