"""The published proxy files and retry policies, each on the real thing: gRPC's client, server, proxy."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.deploy.proxies import CONFIGS, PROXIES, ROOT, environment
from tests.graphs import scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer
    from tests.deploy.proxies import Proxy

SERVICE = "inference.GRPCInferenceService"
POLICY, ROUND_ROBIN = (CONFIGS / "retry_policy.json", CONFIGS / "round_robin.json")
DEPLOY_TESTS = "ONNXEDGE_DEPLOY_TESTS"
by_name = pytest.mark.parametrize("proxy", PROXIES, ids=lambda proxy: proxy.name)


class Refusing:
    """A server that answers with a status so many times before it answers well, and that has a health."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.OK, times: int = 0) -> None:
        self.calls = 0
        self._code, self._times = code, times
        self._lock = threading.Lock()
        self.health = health.HealthServicer()
        self.server = grpc.server(ThreadPoolExecutor(8))
        handlers: dict[str, Any] = {"ServerLive": grpc.unary_unary_rpc_method_handler(self._answer)}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self.server.start()

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self.calls += 1
            refuse = self.calls <= self._times
        if refuse:
            context.abort(self._code, "not now")
        return request


@pytest.fixture
def refusing() -> Iterator[Callable[..., Refusing]]:
    servers: list[Refusing] = []

    def start(*arguments: Any) -> Refusing:
        servers.append(Refusing(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.server.stop(None).wait()


def ask(target: str, config: Path | None, body: bytes = b"", times: int = 1) -> list[str]:
    """The statuses of some calls, one after the other, by a client with a policy."""
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.per_rpc_retry_buffer_size", 16 << 20),
    ]
    if config is not None:
        options.append(("grpc.service_config", config.read_text()))
    statuses = []
    with grpc.insecure_channel(target, options) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/ServerLive")
        for _ in range(times):
            try:
                call(body, timeout=20)
                statuses.append("OK")
            except grpc.RpcError as error:
                statuses.append(error.code().name)
    return statuses


@pytest.mark.parametrize("config", [POLICY, ROUND_ROBIN], ids=lambda path: path.stem)
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_client_with_the_policy_asks_again(
    refusing: Callable[..., Refusing], code: grpc.StatusCode, config: Path
) -> None:
    server = refusing(code, 4)
    assert ask(f"ipv4:{server.address}", config, bytes(1 << 20)) == ["OK"]
    assert server.calls == 5


def test_other_errors_are_not_asked_again(refusing: Callable[..., Refusing]) -> None:
    server = refusing(grpc.StatusCode.INVALID_ARGUMENT, 9)
    assert ask(server.address, POLICY) == ["INVALID_ARGUMENT"]
    assert server.calls == 1


def test_without_the_policy_a_client_fails(refusing: Callable[..., Refusing]) -> None:
    assert ask(refusing(grpc.StatusCode.UNAVAILABLE, 1).address, None) == ["UNAVAILABLE"]


def test_round_robin_divides_calls_among_those_whose_health_is_good(
    refusing: Callable[..., Refusing],
) -> None:
    servers = [refusing() for _ in range(3)]
    servers[1].health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    target = "ipv4:" + ",".join(server.address for server in servers)
    assert Counter(ask(target, ROUND_ROBIN, times=40)) == {"OK": 40}
    assert servers[1].calls == 0
    assert min(servers[0].calls, servers[2].calls) >= 10


def test_both_policies_retry_alike() -> None:
    policy, round_robin = (json.loads(path.read_text()) for path in (POLICY, ROUND_ROBIN))
    balancing = {"loadBalancingConfig", "healthCheckConfig"}
    assert {key: round_robin[key] for key in round_robin.keys() - balancing} == policy
    # Through a proxy the watch would be that of one server, and its drain would end the whole channel.
    assert not policy.keys() & balancing


def test_haproxys_health_check_is_one_that_the_server_answers(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """Its bytes, sent as HAProxy would, bring those that it looks for."""
    text = (CONFIGS / "haproxy.cfg").read_text()
    question = bytes.fromhex("".join(re.findall(r"tcp-check send-binary (\w+)", text)))
    [serving] = re.findall(r"tcp-check expect binary (\w+)", text)
    write_model(tmp_path / "scaled", scaled(2.0))
    ready = serve("--model-repository", tmp_path)
    assert bytes.fromhex(serving) in _reply(ready, question)
    assert ready.stop() == 0
    (tmp_path / "scaled" / "1" / "model.onnx").write_bytes(b"not a graph")
    unready = serve("--model-repository", tmp_path)
    reply = _reply(unready, question)
    assert bytes.fromhex(serving) not in reply
    assert bytes.fromhex(serving)[:-1] + b"\2" in reply
    assert unready.stop() == 0


def _reply(server: RunningServer, question: bytes) -> bytes:
    reply = b""
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=20) as connection:
        connection.sendall(question)
        while b"grpc-status" not in reply and (more := connection.recv(4096)):
            reply += more
    return reply


@by_name
def test_the_proxy_takes_its_file(proxy: Proxy, tmp_path: Path) -> None:
    if proxy.path() is None:
        pytest.skip(f"{proxy.name} is not here: python -m tests.deploy.proxies runs/proxies")
    config = proxy.configure({"onnxedge-1": "127.0.0.2", "onnxedge-2": "127.0.0.3"}, tmp_path)
    subprocess.run(
        proxy.command(proxy.check, config), check=True, timeout=60, env=environment(), capture_output=True
    )


@pytest.mark.skipif(DEPLOY_TESTS not in os.environ, reason=f"takes minutes: {DEPLOY_TESTS}=1 runs it")
@pytest.mark.timeout(900)
def test_rolling_restarts_fail_no_request() -> None:
    # Its table is seen with `pytest -s`, and when it fails.
    done = subprocess.run([sys.executable, "-m", "tests.deploy.rolling_restarts"], cwd=ROOT, check=False)
    assert done.returncode == 0
