"""Entries with other ends, as a client of a real server meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from PIL import Image

from export.__main__ import main
from export.session import Session
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]
BOOT = ROOT / "tests" / "data" / "boot.png"
ENTRIES = {
    "encoded": ("--encoded-image",),
    "best": ("--top-k", "3"),
    "fixed": ("--fix", "batch=1", "--native-size"),
    "encoded_fixed": ("--encoded-image", "--fix", "batch=1"),
}


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., RunningServer], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, Path]]:
    repository = tmp_path_factory.mktemp("served")
    for name, flags in ENTRIES.items():
        shared = ("--to", str(repository), "--name", name, "--precision", "fp32")
        assert main([str(checkpoint), *shared, *flags]) == 0
    running = serve("--model-repository", repository)
    yield running, repository
    running.stop()


def pixels() -> np.ndarray:
    """UINT8 [1, 28, 28, 1]."""
    return np.asarray(Image.open(BOOT).convert("L")).reshape(1, 28, 28, 1)


def logits(repository: Path) -> np.ndarray:
    graph = (repository / "best" / "1" / "model.onnx").read_bytes()
    return Session(graph).run({"image": pixels()})["logits"]


def request(name: str, datatype: str, shape: tuple[int, ...], content: bytes) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=name, raw_input_contents=[content])
    message.inputs.add(name="image", datatype=datatype, shape=shape)
    return message


@pytest.mark.parametrize("name", ["encoded", "encoded_fixed"])
def test_a_file_is_decoded_by_the_server(server: tuple[RunningServer, Path], name: str) -> None:
    running, repository = server
    content = BOOT.read_bytes()
    file = len(content).to_bytes(4, "little") + content
    with grpc.insecure_channel(running.url) as channel:
        answer = GRPCInferenceServiceStub(channel).ModelInfer(
            request(name, "BYTES", (1, 1), file), timeout=30
        )
    found = np.frombuffer(answer.raw_output_contents[0], np.float32)
    assert found == pytest.approx(logits(repository)[0], abs=1e-4)


def test_infer_sends_the_file(server: tuple[RunningServer, Path]) -> None:
    running, repository = server
    command = [sys.executable, "-m", "serve", "infer", "encoded", "--image", str(BOOT), "--url", running.url]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    labels = (repository / "encoded" / "labels.txt").read_text().splitlines()
    assert printed.splitlines()[0].endswith(labels[int(logits(repository).argmax())])


def test_the_best_classes_are_beside_the_logits(server: tuple[RunningServer, Path]) -> None:
    running, repository = server
    with grpc.insecure_channel(running.url) as channel:
        answer = GRPCInferenceServiceStub(channel).ModelInfer(
            request("best", "UINT8", (1, 28, 28, 1), pixels().tobytes()), timeout=30
        )
    raw = dict(zip((output.name for output in answer.outputs), answer.raw_output_contents, strict=True))
    expected = logits(repository)[0]
    best = np.argsort(-expected)[:3]
    assert np.frombuffer(raw["classes"], np.int64).tolist() == best.tolist()
    probabilities = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
    assert np.frombuffer(raw["scores"], np.float32) == pytest.approx(probabilities[best], abs=1e-5)


def test_a_fixed_batch_is_all_that_is_taken(server: tuple[RunningServer, Path]) -> None:
    running, repository = server
    with grpc.insecure_channel(running.url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request("fixed", "UINT8", (1, 28, 28, 1), pixels().tobytes()), timeout=30)
        two = request("fixed", "UINT8", (2, 28, 28, 1), pixels().tobytes() * 2)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(two, timeout=30)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32) == pytest.approx(
        logits(repository)[0], abs=1e-4
    )
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
