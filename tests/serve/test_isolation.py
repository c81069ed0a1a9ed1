"""Graphs that hang, end or fill the process that loads them: not this one."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper

import serve.loading.isolation
from serve.errors import ModelLoadError
from serve.loading.isolation import ProbeLimits, probe
from serve.pb import model_config_pb2 as pb
from serve.pb.grpc_service_pb2 import ModelReadyRequest
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.runtime.session import SessionSettings
from tests.graphs import FLOAT, gather, identity, info, scaled, sequence_output, slow, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx

    from tests.conftest import RunningServer

LIMITS = ProbeLimits(memory_bytes=512 << 20, cpu_seconds=10, seconds=20.0)
BRIEF = ProbeLimits(memory_bytes=512 << 20, cpu_seconds=20, seconds=1.0)
INT64, BOOL = TensorProto.INT64, TensorProto.BOOL


def endless() -> onnx.GraphProto:
    """A loop whose condition is always true and whose number of turns is out of reach."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["m", "m"], ["p"])],
        "body",
        [info("i", [], INT64), info("go", [], BOOL), info("m", [1])],
        [info("go_on", [], BOOL), info("p", [1])],
    )
    constants = [helper.make_tensor("n", INT64, [], [2**62]), helper.make_tensor("t", BOOL, [], [True])]
    node = helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)
    return helper.make_graph([node], "endless", [info("x", [1])], [info("y", [1])], constants)


def aborting() -> onnx.GraphProto:
    """An Einsum over inputs of unknown rank: given scalars, onnxruntime ends the process."""
    node = helper.make_node("Einsum", ["a", "b"], ["y"], equation="ij,jk")
    return helper.make_graph([node], "aborting", [info("a", None), info("b", None)], [info("y", None)])


def huge(*, at_load: bool) -> onnx.GraphProto:
    """40 000 million numbers, as a constant to fold or when it runs."""
    shape = helper.make_tensor("shape", INT64, [2], [200_000, 200_000])
    nodes = [helper.make_node("Expand", ["x", "shape"], ["y"])]
    if at_load:
        nodes = [
            helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
            helper.make_node("Mul", ["zeros", "x"], ["y"]),
        ]
    return helper.make_graph(nodes, "huge", [info("x", [1])], [info("y", ["a", "b"])], [shape])


@pytest.mark.parametrize("graph", [scaled(2), slow(), identity(["n"], TensorProto.STRING), identity([])])
def test_good_graphs_pass(tmp_path: Path, graph: onnx.GraphProto) -> None:
    probe(write_model(tmp_path, graph), SessionSettings(intra_op_threads=2), LIMITS)


def test_a_run_that_zeros_make_fail_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Here no row of a table is 0, for the table has none."""
    graph = gather()
    graph.initializer[0].CopyFrom(helper.make_tensor("table", FLOAT, [0], []))
    probe(write_model(tmp_path, graph), SessionSettings(), LIMITS)


def test_inputs_that_cannot_be_made_up_are_no_reason_to_refuse(tmp_path: Path) -> None:
    probe(write_model(tmp_path, sequence_output()), SessionSettings(), LIMITS)


def test_an_endless_loop_is_stopped_by_the_clock(tmp_path: Path) -> None:
    path = write_model(tmp_path, endless())
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="took longer than 1 s"):
        probe(path, SessionSettings(), BRIEF)
    assert time.monotonic() - started < 10


def test_an_endless_loop_is_stopped_by_its_processor_time(tmp_path: Path) -> None:
    path = write_model(tmp_path, endless())
    limits = ProbeLimits(memory_bytes=512 << 20, cpu_seconds=1, seconds=60.0)
    with pytest.raises(ModelLoadError, match="took longer than 1 s of processor time"):
        probe(path, SessionSettings(), limits)


def test_nothing_is_left_of_a_stopped_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg] # as subprocess has it
        def __init__(self, *args: object, **keywords: object) -> None:
            super().__init__(*args, **keywords)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(ModelLoadError):
        probe(write_model(tmp_path, endless()), SessionSettings(), BRIEF)
    assert started[0].returncode == -9
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


def test_an_abort_ends_the_other_process_only(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"  # onnx's checker would ask for a rank
    model = helper.make_model(aborting(), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelLoadError, match=r"ended the process \(signal 6, SIGABRT\)"):
        probe(path, SessionSettings(), LIMITS)


def grows(power: int) -> onnx.GraphProto:
    """x's length to some power: next to nothing for 1, all memory for what a warm-up tries."""
    nodes = [helper.make_node("Shape", ["x"], ["shape"])]
    nodes += [helper.make_node("Gather", ["shape", "last"], ["length"])]
    nodes += [helper.make_node("Concat", ["length"] * power, ["long"], axis=0)]
    nodes += [helper.make_node("Expand", ["zero", "long"], ["large"])]
    nodes += [helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0)]
    nodes += [helper.make_node("Add", ["x", "sum"], ["y"])]
    constants = [helper.make_tensor("last", INT64, [1], [1]), helper.make_tensor("zero", FLOAT, [1], [0.0])]
    return helper.make_graph(
        nodes, "grows", [info("x", ["n", "length"])], [info("y", ["n", "length"])], constants
    )


def test_the_warm_up_is_tried_there_too(tmp_path: Path) -> None:
    """Zeros of length 1 show nothing of what this graph takes for the rows that a warm-up makes up."""
    path = write_model(tmp_path, grows(6))
    probe(path, SessionSettings(), LIMITS)
    with pytest.raises(ModelLoadError, match="used more than 512 MB"):
        probe(path, SessionSettings(), LIMITS, pb.ModelConfig(max_batch_size=4))
    probe(write_model(tmp_path, grows(2)), SessionSettings(), LIMITS, pb.ModelConfig(max_batch_size=4))


def test_a_config_that_does_not_fit_is_the_servers_to_refuse(tmp_path: Path) -> None:
    path = write_model(tmp_path, scaled(2))
    probe(path, SessionSettings(), LIMITS, text_format.Parse("input { name: 'z' }", pb.ModelConfig()))


@pytest.mark.parametrize("at_load", [True, False])
def test_memory_is_limited(tmp_path: Path, *, at_load: bool) -> None:
    with pytest.raises(ModelLoadError, match=r"used more than 512 MB.*--untrusted-memory-mb"):
        probe(write_model(tmp_path, huge(at_load=at_load)), SessionSettings(), LIMITS)


def test_garbage_is_refused_in_onnxruntimes_words(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no protobuf")
    with pytest.raises(ModelLoadError, match=r"Load model from model\.onnx failed"):
        probe(path, SessionSettings(), LIMITS)


def test_the_process_knows_nothing_of_the_servers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it import from the version folder, which is its working directory."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = write_model(tmp_path, scaled(1))
    (path.parent / "numpy.py").write_text("raise SystemExit('imported from the version folder')")
    (path.parent / "json.py").write_text("raise SystemExit('imported from the version folder')")
    assert "SECRET_TOKEN" not in serve.loading.isolation._environment()
    probe(path, SessionSettings(), LIMITS)


def test_a_server_of_such_graphs_serves_the_good_ones(
    tmp_path: Path, serve: Callable[..., RunningServer]
) -> None:
    for name, graph in {"endless": endless(), "good": scaled(2), "huge": huge(at_load=True)}.items():
        write_model(tmp_path / name, graph)
    server = serve(
        "--model-repository", tmp_path,
        "--untrusted-repository", "--untrusted-timeout-secs=2", "--untrusted-memory-mb=512",
    )  # fmt: skip
    log = "".join(server.log)
    assert "took longer than 2 s" in log
    assert "used more than 512 MB" in log
    with grpc.insecure_channel(server.url) as channel:
        ask = GRPCInferenceServiceStub(channel).ModelReady
        ready = {name: ask(ModelReadyRequest(name=name)).ready for name in ("endless", "good", "huge")}
    assert ready == {"endless": False, "good": True, "huge": False}
    assert server.stop() == 0
