"""A server whose answers and times are known: what a load test must find is known, too.

python -m loadtest.stub --port 9000 --service-ms 2 --freeze 0.5 --every 5.5

It answers one model, `stub`, with the same bytes always. Its service time is kept on a virtual clock: a
single server that takes exactly so long for each request, in the order in which they come, whatever Python
needs for it. A freeze stops all answers for a time, as a garbage collection or a throttled container does.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from loadtest.target import SERVICE
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODEL = "stub"
# Few, so that what waited for a freeze to end is answered in its order; a stream has a thread while it lasts.
_THREADS, _STREAM_THREADS = 8, 64
_SWITCH_SECONDS = 1e-4
SERVING = "stub serves at port "


@dataclass(frozen=True)
class Behaviour:
    """How the stub answers.

    Attributes:
        service: seconds that a request takes, one after the other; 0: none.
        freeze, every: seconds without answers, at the beginning of so many seconds; 0: never.
        status: gRPC's name of the status of each answer.
        fail_every: only each so many-th request has that status.
        tokens, token_seconds: of the stream that a request is answered with; 0: one answer.
    """

    service: float = 0.0
    freeze: float = 0.0
    every: float = 0.0
    status: str = "OK"
    fail_every: int = 1
    tokens: int = 0
    token_seconds: float = 0.0


class Stub:
    """The requests of one server; the clock starts with it."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._lock = threading.Lock()
        self._start = self._free = time.perf_counter()
        self._count = 0
        answer = pb.ModelInferResponse(model_name=MODEL, model_version="1")
        answer.outputs.add(name="y", datatype="FP32", shape=[1])
        answer.raw_output_contents.append(bytes(4))
        self._answer = answer.SerializeToString()
        self._token = pb.ModelStreamInferResponse(infer_response=answer).SerializeToString()

    def infer(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        """The same answer always, when its time has come."""
        if self._behaviour.status != "OK":
            with self._lock:
                self._count += 1
                fails = self._count % self._behaviour.fail_every == 0
            if fails:
                context.abort(grpc.StatusCode[self._behaviour.status], "the stub was told to")
        self._wait()
        return self._answer

    def stream(self, requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        """So many tokens for each request, evenly in time."""
        for _ in requests:
            due = time.perf_counter()
            for _ in range(self._behaviour.tokens):
                due += self._behaviour.token_seconds
                _sleep_until(due)
                yield self._token

    def _wait(self) -> None:
        behaviour = self._behaviour
        if behaviour.service:
            with self._lock:
                self._free = max(self._free, time.perf_counter()) + behaviour.service
                due = self._free
            _sleep_until(due)
        if behaviour.every:
            into = (time.perf_counter() - self._start) % behaviour.every
            if into < behaviour.freeze:
                time.sleep(behaviour.freeze - into)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """By the RPC's name."""
        unary: dict[str, Callable[[bytes, grpc.ServicerContext], bytes]] = {
            "ModelInfer": self.infer,
            "ModelMetadata": lambda _request, _context: _METADATA.SerializeToString(),
            "ServerReady": lambda _request, _context: pb.ServerReadyResponse(ready=True).SerializeToString(),
            "ServerMetadata": lambda _r, _c: pb.ServerMetadataResponse(name="stub").SerializeToString(),
            "ModelConfig": self._config,
        }
        made: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(handle) for name, handle in unary.items()
        }
        return {**made, "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.stream)}

    def _config(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        answer = pb.ModelConfigResponse()
        answer.config.name = MODEL
        answer.config.model_transaction_policy.decoupled = bool(self._behaviour.tokens)
        return answer.SerializeToString()


_METADATA = pb.ModelMetadataResponse(name=MODEL, versions=["1"], platform="stub")
_METADATA.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
_METADATA.outputs.add(name="y", datatype="FP32", shape=[-1])


def _sleep_until(due: float) -> None:
    while (left := due - time.perf_counter()) > 0:
        time.sleep(left)


def start(behaviour: Behaviour, port: int = 0) -> tuple[grpc.Server, int]:
    """A stub in this process; the port that it listens at, on loopback alone."""
    stub = Stub(behaviour)
    threads = ThreadPoolExecutor(_STREAM_THREADS if behaviour.tokens else _THREADS)
    server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
    service = SERVICE.removeprefix("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, stub.handlers()),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.stub", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service-ms", type=float, default=0.0)
    parser.add_argument("--freeze", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=0.0)
    parser.add_argument("--status", choices=[code.name for code in grpc.StatusCode], default="OK")
    parser.add_argument("--fail-every", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--token-ms", type=float, default=0.0)
    options = parser.parse_args()
    behaviour = Behaviour(
        options.service_ms / 1e3, options.freeze, options.every, options.status, options.fail_every,
        options.tokens, options.token_ms / 1e3,
    )  # fmt: skip
    sys.setswitchinterval(_SWITCH_SECONDS)
    server, port = start(behaviour, options.port)
    print(f"{SERVING}{port}", flush=True)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    server.stop(0)


if __name__ == "__main__":
    main()
