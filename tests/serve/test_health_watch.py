"""Clients that watch the server's health come and go, and everybody else is answered meanwhile."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.graphs import scaled, write_model

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
