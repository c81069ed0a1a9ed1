"""How soon a server of one small model is ready, and how much memory it takes. Run: make bench."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from loadtest.payload import INFER_PATH, fetch_metadata, request_bytes
from tests.conftest import start_server
from tests.graphs import scaled, write_model

ROUNDS = 5
REQUESTS = 200


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no VmRSS for process {pid}")


def send(url: str, model: str) -> None:
    """Some requests, so that what is allocated on first use is counted."""
    with grpc.insecure_channel(url) as channel:
        request = request_bytes(fetch_metadata(channel, model))
        call: Any = channel.unary_unary(INFER_PATH)
        for _ in range(REQUESTS):
            call(request)


def measure(root: Path, model: str) -> tuple[float, float, float]:
    """Seconds until the server serves; MiB resident then and after requests."""
    started = time.perf_counter()
    server = start_server("--model-repository", root.resolve())
    ready = time.perf_counter() - started
    before = resident_mib(server.process.pid)
    send(server.url, model)
    after = resident_mib(server.process.pid)
    server.stop()
    return ready, before, after


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny", scaled(1))
        entries = {"tiny": Path(folder)}
        if Path("models/mobilenet").is_dir():
            entries["mobilenet"] = Path("models")
        for model, root in entries.items():
            rounds = [measure(root, model) for _ in range(ROUNDS)]
            ready, before, after = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"{model:<10} ready in {ready:.2f} s, {before:.0f} MiB resident, "
                f"{after:.0f} MiB after {REQUESTS} requests (medians of {ROUNDS})"
            )


if __name__ == "__main__":
    main()
