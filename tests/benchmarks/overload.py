"""Ten times more requests than a server can answer, from an open loop with deadlines: what gets through.

A graph of about 50 ms, one instance, at most `QUEUE` requests waiting; the server on one core, the client on
another. Capacity is what a closed loop gets, goodput what the open one gets within its deadline.
Run: make bench.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.load.clients import Figures, request, run
from tests.benchmarks.server_overhead import start
from tests.graphs import slow, write_model

QUEUE = 7
TIMES = 10
SECONDS = 10.0
ROUNDS = 3
DEADLINE = 1.0
SERVICE_SECONDS = 0.05
CONFIG = f"""
max_batch_size: 0
instance_group {{ count: 1 }}
dynamic_batching {{ default_queue_policy {{ max_queue_size: {QUEUE} }} }}
"""


def multiplications(port: int, core: int) -> int:
    """How many multiplications of the slow graph take about `SERVICE_SECONDS` here."""
    message = request("slow", n=np.array(100, np.int64))
    milliseconds = run("closed_loop", port, message, core, clients=1, seconds=1.0)["p50"]
    return int(100 * SERVICE_SECONDS * 1e3 / milliseconds)


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "slow", slow())
        (Path(folder) / "slow" / "config.pbtxt").write_text(CONFIG)
        flags = ["-m", "serve", "serve", f"--model-repository={folder}", "--grpc-port=0", "--metrics-port=0"]
        process, port = start(flags, cores[0])
        results: list[tuple[Figures, Figures, float]] = []
        try:
            message = request("slow", n=np.array(multiplications(port, cores[-1]), np.int64))
            for _ in range(ROUNDS):
                alone = run("closed_loop", port, message, cores[-1], clients=1, seconds=3.0)
                closed = run("closed_loop", port, message, cores[-1], clients=QUEUE, seconds=SECONDS)
                rate = TIMES * closed["rate"]
                opened = run(
                    "open_loop", port, message, cores[-1], rate=rate, seconds=SECONDS, deadline=DEADLINE
                )
                results.append((closed, opened, alone["p50"]))
        finally:
            process.terminate()
            process.wait()
    report(results)


def report(results: list[tuple[Figures, Figures, float]]) -> None:
    for closed, opened, service in results:
        print(
            f"capacity {closed['rate']:.1f}/s, service time {service:.1f} ms; at {TIMES} times that: goodput "
            f"{opened['rate']:.1f}/s, p50 {opened['p50']:.0f} ms, p99 {opened['p99']:.0f} ms, refused "
            f"{opened['unavailable']:.0f}/s, late {opened['deadline_exceeded']:.1f}/s"
        )
    goodput = statistics.median(opened["rate"] / closed["rate"] for closed, opened, _ in results)
    print(f"ratio    {goodput:.3f} goodput / capacity (median; target: at least 0.95)")
    bound = statistics.median(opened["p99"] / ((QUEUE + 1) * service) for _, opened, service in results)
    print(f"ratio    {bound:.2f} p99 / ((queue bound + 1) x service time) (median; target: at most 1)")


if __name__ == "__main__":
    main()
