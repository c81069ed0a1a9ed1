"""Images of 602 KB both ways: this server, without its allocator setting, and 40 lines of grpcio.

glibc gives blocks over 128 KB back to the kernel and asks for them again, page by page, with every message.
The 40 lines are without the setting, too. The three take turns, each on one core, the clients on another.
Run: make bench.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from onnx import helper

from tests.benchmarks import server_overhead
from tests.benchmarks.load.clients import Figures, request, run
from tests.benchmarks.server_overhead import cpu_seconds, start
from tests.graphs import info, write_model

CLIENTS = 4
SECONDS = 3.0
ROUNDS = 5
SHAPE = (1, 3, 224, 224)
# The command line, but for the setting.
PLAIN = """
import sys, serve.process
serve.process.keep_large_blocks = lambda: False
from serve.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    node = helper.make_node("Relu", ["x"], ["y"])
    tensors = [info(name, ["n", *SHAPE[1:]]) for name in ("x", "y")]
    graph = helper.make_graph([node], "filter", tensors[:1], tensors[1:])
    message = request("filter", x=np.ones(SHAPE, np.float32))
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "filter", graph)
        flags = ["serve", f"--model-repository={folder}", "--grpc-port=0", "--metrics-port=0"]
        commands = {
            "40 lines": [server_overhead.__file__, "baseline", str(path)],
            "without": ["-c", PLAIN, *flags],
            "onnxedge": ["-m", "serve", *flags],
        }
        servers = {name: start(command, cores[0]) for name, command in commands.items()}
        results: dict[str, list[Figures]] = {name: [] for name in servers}
        try:
            for index in range(ROUNDS + 1):
                for name, (process, port) in servers.items():
                    cpu = cpu_seconds(process.pid)
                    figures = run("closed_loop", port, message, cores[-1], clients=CLIENTS, seconds=SECONDS)
                    figures["cpu"] = (cpu_seconds(process.pid) - cpu) / (figures["rate"] * SECONDS) * 1e6
                    if index:  # the first round warms both up
                        results[name].append(figures)
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait()
    for name, rounds in results.items():
        rate, cpu = (statistics.median(figures[key] for figures in rounds) for key in ("rate", "cpu"))
        print(f"{name:<8} {rate:6.0f} requests/s, {cpu:5.0f} µs of server CPU per request")
    for name in ("40 lines", "without"):
        ratios = [
            ours["rate"] / its["rate"] for its, ours in zip(results[name], results["onnxedge"], strict=True)
        ]
        print(
            f"ratio    {statistics.median(ratios):.2f} requests/s, onnxedge / {name} (target: at least 2.5)"
        )


if __name__ == "__main__":
    main()
