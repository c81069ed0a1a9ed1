"""Server CPU per request for a trivial model: this server against 40 lines of grpcio and onnxruntime.

CPU time (user and system) of the server's whole process over the requests that it answered, the two servers
taking turns in one run; each pinned to one core, the client to another where there is one. Run: make bench.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from loadtest.target import INFER_PATH
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)
from tests.graphs import scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7
REQUESTS = 2000


class BaselineServicer(GRPCInferenceServiceServicer):
    """The 40 lines that someone would write instead: generated stubs, one session, no checks, no metrics."""

    def __init__(self, path: str) -> None:
        import onnxruntime as ort  # noqa: PLC0415 - only in the baseline's process

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - the interface's names
        feed = {
            tensor.name: np.frombuffer(raw, np.float32).reshape(tensor.shape)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        outputs = self.session.run(None, feed)
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        for node, array in zip(self.session.get_outputs(), outputs, strict=True):
            response.outputs.add(name=node.name, datatype="FP32", shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


def serve_baseline(path: str) -> None:
    server = grpc.server(ThreadPoolExecutor(16))
    add_GRPCInferenceServiceServicer_to_server(BaselineServicer(path), server)
    print(
        f"SERVING: gRPC at 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", file=sys.stderr, flush=True
    )
    server.start()
    server.wait_for_termination()


def start(command: list[str], *cores: int) -> tuple[subprocess.Popen[str], int]:
    """A server process on these cores, and its port."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509 - no threads here yet
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "SERVING: gRPC at " in line:
            return process, int(line.strip().rstrip('"').rsplit(":", 1)[1])
    raise RuntimeError(f"{command} ended before it served")


def cpu_seconds(pid: int) -> float:
    """User and system time of another process, from its CPU clock (Linux: clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


def measure(call: Callable[[bytes], bytes], request: bytes, pid: int) -> tuple[float, float]:
    """Microseconds of server CPU per request, and the median latency in microseconds, at concurrency 1."""
    latencies = []
    before = cpu_seconds(pid)
    for _ in range(REQUESTS):
        started = time.perf_counter()
        call(request)
        latencies.append(time.perf_counter() - started)
    return (cpu_seconds(pid) - before) / REQUESTS * 1e6, statistics.median(latencies) * 1e6


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "tiny", scaled(1))
        flags = ["--model-repository", folder, "--grpc-port", "0", "--metrics-port", "0"]
        commands = {
            "baseline": [__file__, "baseline", str(path)],
            "onnxedge": ["-m", "serve", "serve", *flags],
        }
        servers = {name: start(command, cores[0]) for name, command in commands.items()}
        os.sched_setaffinity(0, {cores[-1]})
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for index in range(ROUNDS + 1):
            for name, (process, port) in servers.items():
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    call: Any = channel.unary_unary(INFER_PATH)
                    figures = measure(call, request.SerializeToString(), process.pid)
                if index:  # the first round warms both up
                    results[name].append(figures)
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    medians = {name: np.median(np.array(rounds), axis=0) for name, rounds in results.items()}
    for name, (cpu, latency) in medians.items():
        print(f"{name:<9} {cpu:7.1f} µs of server CPU per request, latency p50 {latency:7.1f} µs")
    ratios = [
        ours[0] / theirs[0] for ours, theirs in zip(results["onnxedge"], results["baseline"], strict=True)
    ]
    print(f"ratio     {statistics.median(ratios):.3f} (median of {ROUNDS} rounds; target: at most 1.25)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["baseline"]:
        serve_baseline(sys.argv[2])
    else:
        main()
