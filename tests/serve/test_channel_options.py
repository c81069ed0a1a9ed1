"""What one connection may take, seen from raw HTTP/2 (RFC 9113) where gRPC's client would hide it."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.settings import ServerSettings
from serve.transport.channel_options import channel_options
from tests.graphs import identity, write_model
from tests.serve.http2 import (
    ACK,
    GOAWAY,
    MAX_CONCURRENT_STREAMS,
    MAX_HEADER_LIST_SIZE,
    PING,
    SETTINGS,
    Connection,
    frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer

ENHANCE_YOUR_CALM = 11


def ping(number: int) -> bytes:
    return frame(PING, number.to_bytes(8))


def first(connection: Connection, wanted: int) -> bytes:
    return next(payload for kind, flags, payload in connection.frames() if (kind, flags) == (wanted, 0))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("channel_models")
    write_model(root / "echo", identity(["n"]))
    return root


@pytest.fixture(scope="module")
def server(models: Path, serve: Callable[..., RunningServer]) -> RunningServer:
    return serve("--model-repository", models, "--max-inflight-requests=9", "--max-streams=5")


def options(models: Path, **changes: Any) -> dict[str, int]:
    pairs = channel_options(ServerSettings(model_repository=(models,), **changes), 12345)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_the_limit_of_a_message_is_the_models_unless_it_is_set(models: Path) -> None:
    assert options(models)["grpc.max_receive_message_length"] == 12345
    assert options(models, max_request_bytes=99)["grpc.max_receive_message_length"] == 99


def test_connections_get_old_only_where_asked(models: Path) -> None:
    ages = {"grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms"}
    assert not ages & options(models).keys()
    assert ages <= options(models, grpc_max_connection_age=1, grpc_max_connection_age_grace=1).keys()


def test_the_bounds_of_a_connection_are_announced(server: RunningServer) -> None:
    payload = first(Connection(server.grpc_port), SETTINGS)
    announced = dict(struct.iter_unpack(">HI", payload))
    assert announced[MAX_CONCURRENT_STREAMS] == 9 + 5
    assert announced[MAX_HEADER_LIST_SIZE] == 16384


@pytest.mark.parametrize(("strikes", "cut_off"), [("2", True), ("0", False)])
def test_who_pings_too_often_is_cut_off(
    models: Path, serve: Callable[..., RunningServer], strikes: str, cut_off: object
) -> None:
    server = serve("--model-repository", models, f"--grpc-http2-max-ping-strikes={strikes}")
    connection = Connection(server.grpc_port)
    connection.send(b"".join(ping(number) for number in range(20)))
    frames = connection.frames()
    answered = sum((kind, flags) == (PING, ACK) for kind, flags, _ in itertools.islice(frames, 3 + 20))
    assert answered == 20  # behind the settings, their acknowledgement and the window
    connection.send(ping(20))
    kind, flags, payload = next(frames)
    assert (kind == GOAWAY) is cut_off
    if cut_off:
        assert (int.from_bytes(payload[4:8]), payload[8:]) == (ENHANCE_YOUR_CALM, b"too_many_pings")
    else:
        assert (kind, flags, int.from_bytes(payload)) == (PING, ACK, 20)
    assert server.stop() == 0


def test_connections_that_no_longer_answer_pings_are_closed(
    models: Path, serve: Callable[..., RunningServer]
) -> None:
    flags = ("--grpc-keepalive-time=300", "--grpc-keepalive-timeout=300")
    server = serve("--model-repository", models, *flags, "--grpc-keepalive-permit-without-calls=true")
    kinds = [kind for kind, flags, _ in Connection(server.grpc_port).frames() if flags == 0]
    assert PING in kinds
    assert server.stop() == 0


def test_old_connections_are_told_to_go(models: Path, serve: Callable[..., RunningServer]) -> None:
    flags = ("--grpc-max-connection-age=300", "--grpc-max-connection-age-grace=300")
    server = serve("--model-repository", models, *flags)
    assert GOAWAY in [kind for kind, _, _ in Connection(server.grpc_port).frames()]
    assert server.stop() == 0


def live(channel: grpc.Channel, *metadata: tuple[str, str]) -> str:
    stub: Any = GRPCInferenceServiceStub(channel)
    try:
        stub.ServerLive(pb.ServerLiveRequest(), metadata=metadata, timeout=30)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_metadata_past_the_limit_is_refused_and_the_connection_goes_on(server: RunningServer) -> None:
    with grpc.insecure_channel(server.url) as channel:
        assert live(channel, ("key", "x" * 15_000)) == "OK"
        assert live(channel, ("key", "x" * 17_000)) == "RESOURCE_EXHAUSTED"
        assert live(channel) == "OK"


def test_the_limit_of_metadata_can_be_raised(models: Path, serve: Callable[..., RunningServer]) -> None:
    server = serve("--model-repository", models, "--max-metadata-bytes=65536")
    with grpc.insecure_channel(server.url) as channel:
        assert live(channel, ("key", "x" * 60_000)) == "OK"
        assert live(channel, ("key", "x" * 70_000)) == "RESOURCE_EXHAUSTED"
    assert server.stop() == 0


class Relay:
    """A TCP relay for one connection that counts what the server sends."""

    def __init__(self, port: int) -> None:
        self.received = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, args=(port,), daemon=True).start()

    def _run(self, port: int) -> None:
        with self._listener, socket.create_connection(("127.0.0.1", port)) as server:
            client, _ = self._listener.accept()
            with client:
                forward = threading.Thread(target=self._forward, args=(client, server), daemon=True)
                forward.start()
                while data := server.recv(1 << 16):
                    self.received += len(data)
                    client.sendall(data)
            forward.join()

    @staticmethod
    def _forward(client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:  # either end is gone
            return


def answer_size(server: RunningServer, **client_options: int) -> int:
    """Bytes on the wire for an answer of 400 kB of zeros, which must come back right."""
    relay = Relay(server.grpc_port)
    x = np.zeros(100_000, np.float32)
    message = pb.ModelInferRequest(model_name="echo", raw_input_contents=[x.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    pairs = [(f"grpc.{name}", value) for name, value in client_options.items()]
    with grpc.insecure_channel(relay.url, pairs) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(message, timeout=30).raw_output_contents[0] == x.tobytes()
    return relay.received


def test_answers_are_not_compressed_by_default(server: RunningServer) -> None:
    assert answer_size(server) > 400_000


@pytest.mark.parametrize("level", ["low", "medium", "high"])
def test_answers_are_compressed_for_clients_that_can_read_it(
    models: Path, serve: Callable[..., RunningServer], level: str
) -> None:
    server = serve("--model-repository", models, f"--grpc-infer-response-compression-level={level}")
    assert answer_size(server) < 20_000
    # Bit 0 alone: neither deflate nor gzip.
    assert answer_size(server, compression_enabled_algorithms_bitset=1) > 400_000
    assert server.stop() == 0
