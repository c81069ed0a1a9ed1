"""Clients that watch the server's health come and go, and everybody else is answered meanwhile."""

from __future__ import annotations

import signal
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.graphs import scaled, write_model
from tests.serve.http2 import ACK, HEADERS, INITIAL_WINDOW_SIZE, PING, SETTINGS, Connection, call, frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer

SECONDS = 2
OWN = [("grpc.use_local_subchannel_pool", 1)]


def watch(url: str, failures: list[str]) -> None:
    """Begin and end watches; with the stock servicer the whole server stands still after a few."""
    end = time.monotonic() + SECONDS
    with grpc.insecure_channel(url, OWN) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < end and not failures:
            watching = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
            try:
                next(watching)
            except grpc.RpcError as error:
                failures.append(error.code().name)
            watching.cancel()


def test_watches_that_begin_and_end_stop_nobody(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    write_model(tmp_path / "scaled", scaled(2.0))
    server = serve("--model-repository", tmp_path)
    failures: list[str] = []
    threads = [threading.Thread(target=watch, args=(server.url, failures)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with grpc.insecure_channel(server.url, OWN) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert server.stop() == 0


def read(connection: Connection, begun: threading.Event) -> None:
    """Until the server closes. Pings are answered, or gRPC would take the client for dead after 20 s."""
    for kind, flags, payload in connection.frames():
        if kind == HEADERS:
            begun.set()
        if (kind, flags) == (PING, 0):
            connection.send(frame(PING, payload, ACK))


def test_a_watch_that_takes_no_answer_stops_no_other(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    write_model(tmp_path / "scaled", scaled(2.0))
    server = serve("--model-repository", tmp_path)
    stuck = Connection(server.grpc_port, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    stuck.send(frame(SETTINGS, flags=ACK) + call(1, "/grpc.health.v1.Health/Watch", b""))
    begun = threading.Event()
    threading.Thread(target=read, args=(stuck, begun), daemon=True).start()
    assert begun.wait(20)
    with grpc.insecure_channel(server.url, OWN) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert stub.Check(request, timeout=20).status == health_pb2.HealthCheckResponse.SERVING
        watching = stub.Watch(request, timeout=20)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.wait() == 0
