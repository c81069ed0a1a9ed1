"""How soon a server of one small model is ready, and how much memory it takes. Run: make bench."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import scaled, write_model

ROUNDS = 5
REQUESTS = 200


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no VmRSS for process {pid}")


def send(url: str, model: str) -> None:
    """Some requests with zeros, so that what is allocated on first use is counted."""
    with grpc.insecure_channel(url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
        request = pb.ModelInferRequest(model_name=model)
        for spec in metadata.inputs:
            shape = [max(dim, 1) for dim in spec.shape]
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
            size = {"UINT8": 1, "FP32": 4}[spec.datatype]
            request.raw_input_contents.append(bytes(int(np.prod(shape)) * size))
        for _ in range(REQUESTS):
            stub.ModelInfer(request)


def measure(root: Path, model: str) -> tuple[float, float, float]:
    """Seconds until the server serves; MiB resident then and after requests."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "serve",
            "serve",
            "--model-repository",
            root,
            "--grpc-port=0",
            "--metrics-port=0",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if "SERVING: gRPC at " in line)
    ready = time.perf_counter() - started
    before = resident_mib(process.pid)
    send(f"127.0.0.1:{line.rsplit(':', 1)[1].strip()}", model)
    after = resident_mib(process.pid)
    process.terminate()
    process.wait()
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
