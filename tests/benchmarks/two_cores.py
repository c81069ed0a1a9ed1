"""What a second core is worth: 8 closed-loop clients on BERT mini, the server on two cores against one.

The network has 4 layers of 256 and random weights, the text 128 tokens. The runs share one session, so that
the weights are in memory once. The two servers take turns. Run: make bench.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from export.graph import export_graph, serialize
from tests.benchmarks.footprint import resident_mib
from tests.benchmarks.int8_speedup import MINI, TOKENS, text_case
from tests.benchmarks.load.clients import request, run
from tests.benchmarks.server_overhead import start

CLIENTS = 8
SECONDS = 5.0
ROUNDS = 5


def write_bert(folder: Path) -> int:
    """BERT mini, fp32, as folder/bert; bytes of the graph."""
    torch.set_num_threads(1)
    case = text_case("BERT mini", MINI)
    graph = serialize(export_graph(case.module, case.example))
    (folder / "bert" / "1").mkdir(parents=True)
    return (folder / "bert" / "1" / "model.onnx").write_bytes(graph)


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    ids = np.arange(TOKENS).reshape(1, TOKENS)
    message = request("bert", input_ids=ids, attention_mask=np.ones_like(ids))
    with tempfile.TemporaryDirectory() as folder:
        size = write_bert(Path(folder))
        flags = ["-m", "serve", "serve", f"--model-repository={folder}", "--grpc-port=0", "--metrics-port=0"]
        servers = {"one core": start(flags, cores[0]), "two cores": start(flags, *cores)}
        rates: dict[str, list[float]] = {name: [] for name in servers}
        try:
            for index in range(ROUNDS + 1):
                for name, (_, port) in servers.items():
                    rate = run("closed_loop", port, message, None, clients=CLIENTS, seconds=SECONDS)["rate"]
                    if index:  # the first round warms both up
                        rates[name].append(rate)
            resident = {name: resident_mib(process.pid) for name, (process, _) in servers.items()}
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait()
    for name, rounds in rates.items():
        median = statistics.median(rounds)
        print(f"{name:<9} {median:6.0f} requests/s, {resident[name]:.0f} MiB resident")
    print(f"weights   {size / 2**20:.0f} MiB of graph")
    ratios = [two / one for one, two in zip(rates["one core"], rates["two cores"], strict=True)]
    print(f"ratio     {statistics.median(ratios):.2f} (median of {ROUNDS} rounds; target: at least 1.6)")


if __name__ == "__main__":
    main()
