"""Reloads and unloads under load: no request fails, and the memory comes back."""

from __future__ import annotations

import statistics
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import info, scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from tests.conftest import RunningServer

CYCLES = 100
SETTLING = 15  # cycles until the allocator's heaps have their lasting size
CLIENTS = 3
WIDTH = 1024  # of the weights, 4 MiB: 100 leaks of one would be 400 MiB
GROWTH = 1.05
PAGE = 4096


def weighty(factor: float) -> onnx.GraphProto:
    """y = factor · x, rows of 1024, by way of a matrix of 4 MiB."""
    weights = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32) * np.float32(factor), "weights")
    node = helper.make_node("MatMul", ["x", "weights"], ["y"])
    tensors = [info(name, ["n", WIDTH], TensorProto.FLOAT) for name in ("x", "y")]
    return helper.make_graph([node], "weighty", tensors[:1], tensors[1:], [weights])


def request(model: str, version: str, width: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, model_version=version)
    message.inputs.add(name="x", datatype="FP32", shape=[1, width])
    message.raw_input_contents.append(np.ones(width, np.float32).tobytes())
    return message


class Client(threading.Thread):
    """Asks the models in turn until it is told to stop, and keeps what it got."""

    def __init__(self, url: str, stopping: threading.Event) -> None:
        super().__init__()
        self._url = url
        self._stopping = stopping
        self.answers: dict[tuple[str, str], set[float]] = {}
        self.failures: list[str] = []
        self.answered = 0

    def run(self) -> None:
        asked = [request("reloaded", "", WIDTH), request("reloaded", "1", WIDTH), request("other", "", 4)]
        with grpc.insecure_channel(self._url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = GRPCInferenceServiceStub(channel)
            while not self._stopping.is_set():
                for message in asked:
                    try:
                        answer = stub.ModelInfer(message, timeout=60)
                    except grpc.RpcError as error:
                        self.failures.append(f"{message.model_name}: {error.code()}: {error.details()}")
                        continue
                    key = answer.model_name, answer.model_version
                    value = np.frombuffer(answer.raw_output_contents[0], np.float32)[0]
                    self.answers.setdefault(key, set()).add(float(value))
                    self.answered += 1


def resident(server: RunningServer) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * PAGE


def write_repository(root: Path) -> list[Path]:
    """Models to reload, to come and go, and to leave alone; the graphs that the first one gets in turn."""
    graphs = [write_model(root.parent / str(factor), weighty(factor)) for factor in (2, 3)]
    for number in (1, 2):
        write_model(root / "reloaded", weighty(1), number)
    (root / "reloaded" / "config.pbtxt").write_text("version_policy { all {} }")
    write_model(root / "coming", weighty(1))
    write_model(root / "other", scaled(5))
    return graphs


def turn(stub: Any, graph: Path, target: Path) -> None:
    """One reload, and one load and unload."""
    new = graph.with_name("new.onnx")
    new.write_bytes(graph.read_bytes())
    new.replace(target)
    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="reloaded"), timeout=60)
    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="coming"), timeout=60)
    assert stub.ModelInfer(request("coming", "", WIDTH), timeout=60).model_version == "1"
    stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="coming"), timeout=60)
    while stub.RepositoryIndex(pb.RepositoryIndexRequest()).models[0].reason != "unloaded":
        pass


@pytest.mark.timeout(120)
def test_a_hundred_reloads_and_unloads_fail_nobody_and_leak_nothing(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    root = tmp_path / "models"
    graphs = write_repository(root)
    flags = "--model-control-mode=explicit", "--load-model=reloaded", "--load-model=other"
    server = serve("--model-repository", root, *flags)
    stopping = threading.Event()
    clients = [Client(server.url, stopping) for _ in range(CLIENTS)]
    sizes = []
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        for client in clients:
            client.start()
        try:
            for number in range(SETTLING + CYCLES):
                turn(stub, graphs[number % 2], root / "reloaded" / "2" / "model.onnx")
                sizes.append(resident(server) / 2**20)
        finally:
            stopping.set()
            for client in clients:
                client.join()
        counts = stub.ModelStatistics(pb.ModelStatisticsRequest(name="reloaded", version="1")).model_stats[0]

    assert [failure for client in clients for failure in client.failures] == []
    answered = sum(client.answered for client in clients)
    assert answered > CYCLES
    answers = {key: set().union(*(client.answers[key] for client in clients)) for key in clients[0].answers}
    # Version 1 was never touched; 2 was its first graph, and then the two others in turn.
    assert answers == {("reloaded", "1"): {1}, ("reloaded", "2"): {1, 2, 3}, ("other", "1"): {5}}
    assert counts.inference_count == answered // 3
    # Ten at a time: a graph may be on its way in or out while the memory is read.
    before, after = (statistics.median(part) for part in (sizes[SETTLING - 10 : SETTLING], sizes[-10:]))
    print(f"{answered} requests; {before:.1f} MiB resident before, {after:.1f} MiB after")
    assert after < before * GROWTH
    assert server.stop() == 0
