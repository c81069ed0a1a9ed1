"""How soon a server of one model is ready, and how much memory it takes. Run: make bench."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from export.targets import this_target
from loadtest.payload import request_bytes
from loadtest.target import INFER_PATH, Questions, Target
from tests.benchmarks.int8_speedup import graphs, image_case
from tests.conftest import start_server
from tests.graphs import scaled, write_model
from train import mobilenet

ROUNDS = 5
REQUESTS = 200


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no VmRSS for process {pid}")


def send(url: str, model: str) -> None:
    """Some requests, so that what is allocated on first use is counted."""
    with grpc.insecure_channel(url) as channel, Questions(Target(url)) as questions:
        request = request_bytes(questions.metadata(model))
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
        roots = {name: Path(folder) / name for name in ("tiny", "mobilenet", "mobilenet_224")}
        write_model(roots["tiny"] / "tiny", scaled(1))
        write_mobilenet(roots["mobilenet_224"] / "mobilenet_224")
        if Path("models/mobilenet").is_dir():
            shutil.copytree("models/mobilenet", roots["mobilenet"] / "mobilenet")
        else:
            del roots["mobilenet"]
        for model, root in roots.items():
            rounds = [measure(root, model) for _ in range(ROUNDS)]
            ready, before, after = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"{model:<13} ready in {ready:.2f} s, {before:.0f} MiB resident, {after:.0f} MiB after "
                f"{REQUESTS} requests (medians of {ROUNDS}; targets for MobileNet: 1 s, 120 MB)"
            )


def write_mobilenet(folder: Path) -> None:
    """MobileNetV2 for 224 pixels and 1000 classes, int8, untrained, as an entry that batches up to 8."""
    case = image_case("MobileNetV2", mobilenet, {"version": "v2"})
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(graphs(case, this_target())["int8"])
    (folder / "config.pbtxt").write_text("max_batch_size: 8")


if __name__ == "__main__":
    main()
