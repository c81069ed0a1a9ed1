"""SIGTERM: what was accepted is answered, what comes is refused for clients to go elsewhere, then the end."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import re
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.transport.connections import hang_up
from tests.graphs import identity, slow, write_model
from tests.serve.closed_loop import OWN_CONNECTION, ClosedLoop, health, slow_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer

LONG = 10_000_000
GRACE = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drain_models")
    write_model(root / "slow", slow())
    write_model(root / "echo", identity(["n", "m"]))
    return root


def accepted(access_log: Path) -> set[str]:
    """Ids of the requests that the server says it answered."""
    lines = map(json.loads, access_log.read_text().splitlines())
    return {line["id"] for line in lines if line["method"] == "ModelInfer" and line["code"] == "OK"}


class IdleStreams:
    """An inference stream and a health watch that their client never ends."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url, OWN_CONNECTION)
        self._nothing: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()
        stub: Any = GRPCInferenceServiceStub(self._channel)
        watcher: Any = health_pb2_grpc.HealthStub(self._channel)
        self._stream = stub.ModelStreamInfer(iter(self._nothing.get, None))
        self._watch = watcher.Watch(health_pb2.HealthCheckRequest())
        self._nothing.put(slow_request(1))
        assert not next(self._stream).error_message
        assert next(self._watch).status == health_pb2.HealthCheckResponse.SERVING
        self._seen: list[int] = []
        self._watcher = threading.Thread(target=self._follow)
        self._watcher.start()

    def _follow(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            self._seen.extend(answer.status for answer in self._watch)

    def end(self) -> list[int]:
        """What the watch said, now that the server is gone."""
        self._watcher.join(30)
        assert not self._watcher.is_alive()
        self._nothing.put(None)
        self._channel.close()
        return self._seen


def scrape(server: RunningServer) -> None:
    """Ask for the metrics until nobody answers: each time the server starts a thread, SIGTERM or not."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            server.metrics()


@pytest.mark.parametrize("seed", range(20))
def test_sigterm_under_load_loses_nothing(
    serve: Callable[..., RunningServer], models: Path, tmp_path: Path, seed: int
) -> None:
    log = tmp_path / "access.json"
    flags = (f"--access-log={log}", f"--exit-timeout-secs={GRACE}")
    server = serve("--model-repository", models, *flags)
    idle = IdleStreams(server.url)
    load = ClosedLoop(server.url)
    scraper = threading.Thread(target=scrape, args=(server,))
    scraper.start()
    load.wait_for(random.Random(seed).randrange(10, 60))  # noqa: S311 - not a secret
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < GRACE
    outcomes = load.stop()
    scraper.join(60)
    assert idle.end() == [health_pb2.HealthCheckResponse.NOT_SERVING]
    assert outcomes.answered == accepted(log)
    assert {code for code, _ in outcomes.refused} == {"UNAVAILABLE"}, outcomes.refused
    # Health had changed before anyone was refused.
    assert outcomes.health_at_refusal <= {"NOT_SERVING", "UNAVAILABLE"}


def test_new_connections_are_accepted_and_refused_until_the_last_answer(
    serve: Callable[..., RunningServer], models: Path
) -> None:
    server = serve("--model-repository", models)
    with grpc.insecure_channel(server.url, OWN_CONNECTION) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        running = _occupy(server, stub)
        server.process.send_signal(signal.SIGTERM)
        _until(lambda: health(channel) != "SERVING")
        assert health(channel) == "NOT_SERVING"
        for _ in range(3):
            with grpc.insecure_channel(server.url, OWN_CONNECTION) as later:
                late: Any = GRPCInferenceServiceStub(later)
                _until(lambda late=late: "shutting down" in _refusal(late)[1])  # type: ignore[misc]
                assert _refusal(late)[0] == "UNAVAILABLE"
                assert not late.ServerReady(pb.ServerReadyRequest()).ready
        # Those that came after the signal were refused.
        going_on = [call for call in running if not call.done()]
        assert going_on
        for call in going_on:
            call.cancel()
        assert server.process.wait(GRACE) == 0


def test_who_is_not_done_within_the_grace_is_cut_off(
    serve: Callable[..., RunningServer], models: Path
) -> None:
    server = serve("--model-repository", models, "--exit-timeout-secs=1")
    with grpc.insecure_channel(server.url, OWN_CONNECTION) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        running = _occupy(server, stub)
        started = time.monotonic()
        assert server.stop() == 1
        assert 1 <= time.monotonic() - started < GRACE
        assert {call.exception().code().name for call in running} <= {"UNAVAILABLE", "CANCELLED"}


def _occupy(server: RunningServer, stub: Any) -> list[Any]:
    """Send more requests that don't end than the server runs at once; return when one waits."""
    running = [stub.ModelInfer.future(slow_request(LONG)) for _ in range(8)]
    line = re.compile(r'^nv_inference_pending_request_count{model="slow",version="1"} [1-9]', re.MULTILINE)
    _until(lambda: line.search(server.metrics()) is not None)
    return running


def _refusal(stub: Any) -> tuple[str, str]:
    try:
        stub.ModelInfer(slow_request(1), timeout=30)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end


@pytest.fixture
def pair() -> Iterator[tuple[int, socket.socket, socket.socket]]:
    """A port of this process, its end of a connection, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            server, _ = listener.accept()
            with server:
                yield port, server, client


def test_a_connection_is_closed_when_its_last_bytes_have_arrived(
    pair: tuple[int, socket.socket, socket.socket],
) -> None:
    port, server, client = pair
    content = bytes(range(256)) * 20_000
    server.settimeout(0)
    sent = server.send(content)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.extend(iter(lambda: client.recv(1 << 16), b"")))
    reader.start()
    started = time.monotonic()
    hang_up(port, 30)
    assert time.monotonic() - started < 20
    reader.join(30)
    assert b"".join(received) == content[:sent]


def test_a_client_that_still_writes_is_not_reset_before_it_has_read(
    pair: tuple[int, socket.socket, socket.socket],
) -> None:
    """A proxy that says how much of an answer it has read would otherwise meet a reset, and drop the rest."""
    port, server, client = pair
    server.sendall(b"the answer")
    ending = threading.Thread(target=hang_up, args=(port, 30))
    ending.start()
    close_wait = 8
    _until(lambda: client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == close_wait)
    for _ in range(3):
        client.sendall(b"late")
        time.sleep(0.02)
    assert client.recv(100) == b"the answer"
    assert client.recv(100) == b""
    client.close()
    ending.join(20)
    assert not ending.is_alive()


def test_a_client_that_reads_nothing_is_not_waited_for_longer(
    pair: tuple[int, socket.socket, socket.socket],
) -> None:
    port, server, client = pair
    server.settimeout(0)
    while True:
        try:
            server.send(bytes(1 << 20))
        except BlockingIOError:
            break
    started = time.monotonic()
    hang_up(port, 0.2)
    assert 0.2 <= time.monotonic() - started < 10
    with pytest.raises(BrokenPipeError):
        server.send(b"more")
    assert client.recv(1) == b"\0"


def test_a_port_is_closed_and_others_are_left_alone(pair: tuple[int, socket.socket, socket.socket]) -> None:
    port, server, client = pair
    with socket.create_server(("127.0.0.1", 0)) as other:
        hang_up(other.getsockname()[1], 1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(other.getsockname())
    server.sendall(b"still here")
    assert client.recv(10) == b"still here"
    socket.create_connection(("127.0.0.1", port)).close()
    hang_up(port, 1)
    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
