"""Loads, reloads and unloads over gRPC: explicit and poll mode, KServe's dialect, health, hostile graphs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import info, scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx

    from tests.conftest import RunningServer

    Start = Callable[..., RunningServer]

INTEROP = Path(__file__).parent / "interop_model_control.py"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

INVALID = "INVALID_ARGUMENT"


def endless() -> onnx.GraphProto:
    """y = x, negated more often than anybody waits for."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["v"], ["w"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("v", ["n", 4])],
        [info("go_on", [], TensorProto.BOOL), info("w", ["n", 4])],
    )
    rounds = helper.make_tensor("rounds", TensorProto.INT64, [], [1 << 60])
    node = helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    return helper.make_graph([node], "endless", [info("x", ["n", 4])], [info("y", ["n", 4])], [rounds])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of the server in explicit mode."""
    root = tmp_path_factory.mktemp("explicit")
    for name in ("a", "b", "kserve", "watched", "reloaded"):
        write_model(root / name, scaled(1))
    write_model(root / "broken", scaled(1)).write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def explicit(serve: Start, folder: Path) -> RunningServer:
    return serve("--model-repository", folder, "--model-control-mode=explicit", "--untrusted-timeout-secs=2")


@pytest.fixture
def stub(explicit: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(explicit.url) as channel:
        yield GRPCInferenceServiceStub(channel)


def infer(stub: Any, model: str, version: str = "") -> float:
    message = pb.ModelInferRequest(model_name=model, model_version=version)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    answer = stub.ModelInfer(message, timeout=60)
    return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])


def load(stub: Any, name: str, config: str | None = None, **files: bytes) -> Any:
    message = pb.RepositoryModelLoadRequest(model_name=name)
    if config is not None:
        message.parameters["config"].string_param = config
    for key, content in files.items():
        message.parameters[key].bytes_param = content
    return stub.RepositoryModelLoad(message, timeout=60)


def unload(stub: Any, name: str) -> Any:
    return stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name), timeout=60)


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    return caught.value.code().name, caught.value.details() or ""


def index(stub: Any, *, ready: bool = False) -> dict[tuple[str, str], tuple[str, str]]:
    models = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready)).models
    return {(model.name, model.version): (model.state, model.reason) for model in models}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.01)


def test_a_model_comes_and_goes(stub: Any) -> None:
    assert index(stub)["b", ""] == ("", "")
    assert not any(name == "b" for name, _ in index(stub, ready=True))
    assert refused(infer, stub, "b") == ("NOT_FOUND", "Request for unknown model: 'b' is not found")
    load(stub, "b")
    assert infer(stub, "b") == 1
    assert index(stub)["b", "1"] == index(stub, ready=True)["b", "1"] == ("READY", "")
    unload(stub, "b")
    code, text = refused(infer, stub, "b")
    assert (code, "has no available versions" in text) == ("NOT_FOUND", True)
    code, text = refused(infer, stub, "b", "1")
    assert (code, "is not at ready state" in text) == ("UNAVAILABLE", True)
    assert not stub.ModelReady(pb.ModelReadyRequest(name="b")).ready
    assert refused(stub.ModelStatistics, pb.ModelStatisticsRequest(name="b"))[0] == "INVALID_ARGUMENT"
    until(lambda: index(stub)["b", "1"] == ("UNAVAILABLE", "unloaded"))
    assert not any(name == "b" for name, _ in index(stub, ready=True))
    unload(stub, "b")
    unload(stub, "nope")
    load(stub, "b")
    assert infer(stub, "b") == 1


def test_a_reload_keeps_what_did_not_change_and_all_of_it_where_one_version_fails(
    stub: Any, folder: Path
) -> None:
    (folder / "reloaded" / "config.pbtxt").write_text("version_policy { all {} }")
    write_model(folder / "reloaded", scaled(2), 2)
    load(stub, "reloaded")
    assert [infer(stub, "reloaded", version) for version in ("1", "2", "")] == [1, 2, 2]
    write_model(folder / "reloaded", scaled(20), 2)
    load(stub, "reloaded")
    assert [infer(stub, "reloaded", version) for version in ("1", "2", "")] == [1, 20, 20]
    counts = stub.ModelStatistics(pb.ModelStatisticsRequest(name="reloaded")).model_stats
    assert {stats.version: stats.inference_count for stats in counts} == {"1": 2, "2": 2}
    (folder / "reloaded" / "2" / "model.onnx").write_bytes(b"broken")
    code, text = refused(load, stub, "reloaded")
    assert code == "INVALID_ARGUMENT"
    assert text.startswith("load failed for model 'reloaded': version 2 is at UNAVAILABLE state: ")
    assert [infer(stub, "reloaded", version) for version in ("1", "2", "")] == [1, 20, 20]
    state, reason = index(stub)["reloaded", "2"]
    assert (state, "no ONNX model" in reason) == ("READY", True)
    assert stub.ServerReady(pb.ServerReadyRequest()).ready


def test_a_model_that_cannot_be_loaded_says_why(stub: Any, folder: Path) -> None:
    code, text = refused(load, stub, "broken")
    assert code == "INVALID_ARGUMENT"
    assert text.startswith("load failed for model 'broken': version 1 is at UNAVAILABLE state: ")
    assert str(folder) not in text
    assert index(stub)["broken", "1"][0] == "UNAVAILABLE"
    assert refused(infer, stub, "broken")[0] == "NOT_FOUND"
    assert not stub.ServerReady(pb.ServerReadyRequest()).ready
    unload(stub, "broken")
    assert stub.ServerReady(pb.ServerReadyRequest()).ready


@pytest.mark.parametrize("name", ["nope", "", ".", "..", "../explicit/a", "a/../a", "/etc", ".git", "a\0"])
def test_names_that_are_no_model_are_an_internal_error_as_in_triton(stub: Any, name: str) -> None:
    text = f"failed to load '{name}', failed to poll from model repository"
    assert refused(load, stub, name) == ("INTERNAL", text)
    unload(stub, name)


def test_a_repository_name_is_not_supported(stub: Any) -> None:
    expected = ("UNIMPLEMENTED", "'repository_name' specification is not supported")
    for call, message in (
        (stub.RepositoryIndex, pb.RepositoryIndexRequest(repository_name="x")),
        (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(repository_name="x")),
        (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(repository_name="a", model_name="a")),
        (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(repository_name="x")),
    ):
        assert refused(call, message) == expected


def test_kserves_dialect_is_understood_and_its_answer_always_given(explicit: RunningServer) -> None:
    name, done = b"\x0a\x06kserve", b"\x0a\x06kserve\x10\x01"
    with grpc.insecure_channel(explicit.url) as channel:
        service = "/inference.GRPCInferenceService"
        raw: Any = {
            kind: channel.unary_unary(f"{service}/RepositoryModel{kind}") for kind in ("Load", "Unload")
        }
        stub: Any = GRPCInferenceServiceStub(channel)
        assert raw["Load"](name) == done
        assert infer(stub, "kserve") == 1
        assert raw["Unload"](name) == done
        assert refused(infer, stub, "kserve")[0] == "NOT_FOUND"
        assert raw["Load"](b"\x12\x06kserve") == done
        assert raw["Unload"](b"\x12\x06kserve") == done


@pytest.mark.parametrize(
    ("key", "value", "code", "text"),
    [
        ("konfig", {"string_param": "{}"}, INVALID, "unrecognized load parameter 'konfig'"),
        ("config", {"bytes_param": b"{}"}, INVALID, "invalid value type for load parameter 'config'"),
        ("config", {"string_param": "no JSON"}, "INTERNAL", "ModelConfig as JSON"),
        ("config", {"string_param": '{"ensemble_scheduling": {}}'}, INVALID, "'ensemble_scheduling' is not"),
        ("file:1/model.onnx", {"bytes_param": b""}, "INTERNAL", "'config' is missing"),
        ("file:1/../../x", {"bytes_param": b""}, INVALID, "expected 'file:VERSION/NAME'"),
    ],
)
def test_bad_parameters_are_refused_with_tritons_codes(
    stub: Any, key: str, value: dict[str, Any], code: str, text: str
) -> None:
    message = pb.RepositoryModelLoadRequest(model_name="a")
    message.parameters[key].CopyFrom(pb.ModelRepositoryParameter(**value))
    seen, details = refused(stub.RepositoryModelLoad, message)
    assert seen == code
    assert text in details


def test_a_bad_type_of_unload_dependents_is_refused(stub: Any) -> None:
    message = pb.RepositoryModelUnloadRequest(model_name="a")
    message.parameters["unload_dependents"].int64_param = 1
    assert refused(stub.RepositoryModelUnload, message)[0] == "INVALID_ARGUMENT"


def test_a_config_alone_changes_how_the_files_on_disk_are_served(stub: Any) -> None:
    load(stub, "a", '{"max_batch_size": 3}')
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="a"))
    assert list(metadata.inputs[0].shape) == [-1, 4]
    assert stub.ModelConfig(pb.ModelConfigRequest(name="a")).config.max_batch_size == 3
    load(stub, "a")
    assert stub.ModelConfig(pb.ModelConfigRequest(name="a")).config.max_batch_size == 0


def test_a_graph_over_the_wire_that_never_ends_harms_nobody(stub: Any, tmp_path: Path) -> None:
    load(stub, "b")
    graph = write_model(tmp_path, endless()).read_bytes()
    loading = stub.RepositoryModelLoad.future(_with_graph("new", graph), timeout=60)
    answered = 0
    while not loading.done():
        assert infer(stub, "b") == 1
        answered += 1
    assert loading.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "load failed for model 'new'" in loading.details()
    assert answered > 10
    assert not any(name == "new" for name, _ in index(stub))


def _with_graph(name: str, graph: bytes) -> pb.RepositoryModelLoadRequest:
    message = pb.RepositoryModelLoadRequest(model_name=name)
    message.parameters["config"].string_param = "{}"
    message.parameters["file:1/model.onnx"].bytes_param = graph
    return message


def test_health_follows_loads_and_unloads(explicit: RunningServer, stub: Any, folder: Path) -> None:
    with grpc.insecure_channel(explicit.url) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watched = health_pb2.HealthCheckRequest(service="watched")
        load(stub, "watched")
        assert health.Check(watched).status == SERVING
        seen = health.Watch(watched)
        assert next(seen).status == SERVING
        (folder / "watched" / "1" / "model.onnx").write_bytes(b"broken")
        refused(load, stub, "watched")
        assert health.Check(watched).status == SERVING
        unload(stub, "watched")
        assert health.Check(watched).status == NOT_SERVING
        assert any(message.status == NOT_SERVING for message in seen)
        write_model(folder / "watched", scaled(1))
        load(stub, "watched")
        assert any(message.status == SERVING for message in seen)
        seen.cancel()


def test_what_tritonclient_sees(serve: Start, tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "a", scaled(1))
    graph = write_model(tmp_path / "other", scaled(5))
    server = serve("--model-repository", tmp_path / "models", "--model-control-mode=explicit")
    done = subprocess.run(
        [sys.executable, INTEROP, server.url, graph], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(done.stdout)
    poll = "failed to load '{}', failed to poll from model repository"
    assert seen["unknown"] == ["StatusCode.INTERNAL", poll.format("nope")]
    assert seen["empty"] == ["StatusCode.INTERNAL", poll.format("")]
    assert seen["loaded"] == seen["with_files"] == ["OK", ""]
    assert seen["answers"] == [1, 5]
    assert seen["served"] == [["5"], ["-1", "4"]]
    assert {"name": "a", "version": "5", "state": "READY"} in seen["index"]
    assert seen["files_alone"][0] == seen["bad_config"][0] == "StatusCode.INTERNAL"
    assert seen["unload"] == seen["unload_again"] == seen["unload_unknown"] == ["OK", ""]
    assert seen["after"][0] == "StatusCode.NOT_FOUND"
    assert seen["is_ready"] is False


def test_without_explicit_mode_requests_load_nothing(server: RunningServer) -> None:
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        for call in (load, unload):
            code, text = refused(call, stub, "fixed")
            assert code == "UNAVAILABLE"
            assert text.startswith("explicit model load / unload is not allowed")


def test_poll_mode_follows_the_disk(serve: Start, tmp_path: Path) -> None:
    root = tmp_path / "models"
    write_model(root / "changing", scaled(1))
    write_model(root / "going", scaled(1))
    server = serve("--model-repository", root, "--model-control-mode=poll", "--repository-poll-secs=1")
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        message = "explicit model load / unload is not allowed if polling is enabled"
        assert (
            refused(load, stub, "changing") == refused(unload, stub, "changing") == ("UNAVAILABLE", message)
        )
        write_model(tmp_path / "whole", scaled(7))
        (tmp_path / "whole").rename(root / "coming")
        write_model(root / "changing", scaled(2), 2)
        until(lambda: {("coming", "1"), ("changing", "2")} <= index(stub, ready=True).keys())
        assert (infer(stub, "coming"), infer(stub, "changing")) == (7, 2)
        shutil.rmtree(root / "going")
        write_model(root / "changing", scaled(3), 3).write_bytes(b"broken")
        until(lambda: not any(name == "going" for name, _ in index(stub)))
        until(lambda: ("changing", "3") in index(stub))
        assert refused(infer, stub, "going")[0] == "NOT_FOUND"
        assert infer(stub, "changing") == 2
        assert index(stub)["changing", "3"][0] == "UNAVAILABLE"


def test_poll_mode_waits_for_a_version_to_be_written_out(serve: Start, tmp_path: Path) -> None:
    root = tmp_path / "models"
    write_model(root / "m", scaled(1))
    server = serve("--model-repository", root, "--model-control-mode=poll", "--repository-poll-secs=1")
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        graph = write_model(tmp_path / "other", scaled(2)).read_bytes()
        (root / "m" / "2").mkdir()
        end = time.monotonic() + 3.5
        with (root / "m" / "2" / "model.onnx").open("wb", buffering=0) as file:
            while time.monotonic() < end:  # longer than two looks take
                file.write(graph[: len(graph) // 2])
                assert infer(stub, "m") == 1
                assert index(stub) == {("m", "1"): ("READY", "")}
                time.sleep(0.05)
                file.write(b"")
        (root / "m" / "2" / "model.onnx").write_bytes(graph)
        until(lambda: infer(stub, "m") == 2)
        assert index(stub, ready=True) == {("m", "2"): ("READY", "")}


def test_a_config_from_a_client_names_no_files_of_the_server(stub: Any) -> None:
    accelerator = {"name": "tensorrt", "parameters": {"trt_engine_cache_path": "/somewhere"}}
    config = {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}
    message = pb.RepositoryModelLoadRequest(model_name="a")
    message.parameters["config"].string_param = json.dumps(config)
    code, details = refused(stub.RepositoryModelLoad, message)
    assert code == "INVALID_ARGUMENT"
    assert "trt_engine_cache_path of an execution accelerator name files" in details
