"""What dynamic batching is worth: 32 closed-loop clients on an LSTM, batching on against batching off.

Two servers of the same graph take turns in one run, each alone on one core; the clients are on another.
The graph is an LSTM(64) over 96 steps of 7 columns with a linear layer behind it. A gRPC call costs about
100 µs of Python and kernel whatever runs behind it, so the gain is smaller than what batching saves in the
graph: the output says what each costs. Run: make bench.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.benchmarks.load.clients import Figures, request, run
from tests.benchmarks.server_overhead import cpu_seconds, start
from tests.graphs import info, scaled, write_model

if TYPE_CHECKING:
    import subprocess

CLIENTS = 32
SECONDS = 3.0
ROUNDS = 5
HIDDEN, STEPS, COLUMNS, HORIZON = 64, 96, 7, 24


def lstm() -> onnx.GraphProto:
    """Forecast [n, 24] of series [n, 96, 7]: one LSTM layer, and a linear one on its last state."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        return helper.make_tensor(name, TensorProto.FLOAT, shape, values.tobytes(), raw=True)

    nodes = [
        helper.make_node("Transpose", ["series"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r", "b"], ["", "last", ""], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["last", "zero"], ["state"]),
        helper.make_node("Gemm", ["state", "head"], ["forecast"]),
    ]
    constants = [
        weight("w", 1, 4 * HIDDEN, COLUMNS),
        weight("r", 1, 4 * HIDDEN, HIDDEN),
        weight("b", 1, 8 * HIDDEN),
        weight("head", HIDDEN, HORIZON),
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
    ]
    inputs, outputs = [info("series", ["n", STEPS, COLUMNS])], [info("forecast", ["n", HORIZON])]
    return helper.make_graph(nodes, "lstm", inputs, outputs, constants)


REQUESTS = {
    "lstm": request("lstm", series=np.ones((1, STEPS, COLUMNS), np.float32)),
    "tiny": request("tiny", x=np.ones((1, 4), np.float32)),
}


def counts(port: int, model: str) -> tuple[int, int, int]:
    """Rows answered, runs, and nanoseconds of all runs together."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = GRPCInferenceServiceStub(channel).ModelStatistics(pb.ModelStatisticsRequest(name=model))
    found = answer.model_stats[0]
    nanoseconds = sum(batch.compute_infer.ns for batch in found.batch_stats)
    return found.inference_count, found.execution_count, nanoseconds


def measure(process: subprocess.Popen[str], port: int, model: str, core: int) -> Figures:
    """What the clients saw; rows of a run; µs of server CPU and in the graph, per request."""
    before, cpu = counts(port, model), cpu_seconds(process.pid)
    figures = run("closed_loop", port, REQUESTS[model], core, clients=CLIENTS, seconds=SECONDS)
    after, cpu = counts(port, model), cpu_seconds(process.pid) - cpu
    rows, runs, nanoseconds = (b - a for a, b in zip(before, after, strict=True))
    return figures | {"rows": rows / runs, "graph": nanoseconds / rows / 1e3, "cpu": cpu / rows * 1e6}


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for model, graph in (("lstm", lstm()), ("tiny", scaled(1))):
            write_model(Path(folder) / model, graph)
            (Path(folder) / model / "config.pbtxt").write_text(f"max_batch_size: {CLIENTS}")
        flags = ["-m", "serve", "serve", f"--model-repository={folder}", "--grpc-port=0", "--metrics-port=0"]
        servers = {
            "on": start(flags, cores[0]),
            # Then a config without dynamic_batching means what it says.
            "off": start([*flags, "--disable-auto-complete-config"], cores[0]),
        }
        results: dict[str, list[Figures]] = {name: [] for name in servers}
        try:
            for index in range(ROUNDS + 1):
                for name, (process, port) in servers.items():
                    figures = measure(process, port, "lstm", cores[-1])
                    if index:  # the first round warms both up
                        results[name].append(figures)
            transport = measure(*servers["off"], "tiny", cores[-1])["cpu"]
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait()
    report(results, transport)


def report(results: dict[str, list[Figures]], transport: float) -> None:
    for name, rounds in results.items():
        median = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        print(
            f"batching {name:<3} {median['rate']:6.0f} requests/s, p50 {median['p50']:5.2f} ms, "
            f"p99 {median['p99']:5.2f} ms; {median['rows']:4.1f} rows a run; per request: "
            f"{median['cpu']:4.0f} µs of server CPU, {median['graph']:4.0f} µs in the graph"
        )
    print(f"transport    {transport:4.0f} µs of server CPU per request of a graph of one node, batching off")
    for key, target in (("rate", "throughput, target: at least 1.2"), ("p99", "p99, target: at most 1")):
        ratios = [on[key] / off[key] for on, off in zip(results["on"], results["off"], strict=True)]
        print(f"ratio        {statistics.median(ratios):.2f} on / off, {target} (median of {ROUNDS} rounds)")


if __name__ == "__main__":
    main()
