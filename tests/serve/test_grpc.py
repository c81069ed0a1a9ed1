"""The gRPC endpoint from outside: status codes, limits, health, reflection, cancellation, drain."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from serve import __version__
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.protocol.datatypes import DATATYPES
from serve.protocol.tensor_codec import decode_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer

LONG = 1_000_000
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return GRPCInferenceServiceStub(channel)


def request(model: str, datatype: str = "FP32", **inputs: np.ndarray) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message


def slow_request(multiplications: int) -> pb.ModelInferRequest:
    return request("slow", "INT64", n=np.array(multiplications, np.int64))


def refused(call: Callable[[Any], Any], message: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(message)
    return caught.value.code().name, caught.value.details() or ""


def wait_for_pending(server: RunningServer, model: str, count: int) -> None:
    """Return when `count` requests of a model wait on the server, so that both its instances are busy."""
    line = f'nv_inference_pending_request_count{{model="{model}",version="1"}} {count}\n'
    end = time.monotonic() + 30
    while line not in server.metrics():
        assert time.monotonic() < end, f"never saw {line}"


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (request("nope"), "NOT_FOUND", "unknown model: 'nope'"),
        (request(""), "NOT_FOUND", "unknown model: ''"),
        (pb.ModelInferRequest(model_name="fixed", model_version="7"), "NOT_FOUND", "version 7"),
        (pb.ModelInferRequest(model_name="fixed", model_version="0"), "NOT_FOUND", "version 0"),
        (pb.ModelInferRequest(model_name="fixed", model_version="one"), "INVALID_ARGUMENT", "'one'"),
        (request("fixed", x=np.zeros((1, 4), np.float32)), "INVALID_ARGUMENT", "[1, 3], got [1, 4]"),
        (
            request("fixed", "FP64", x=np.zeros((1, 3))),
            "INVALID_ARGUMENT",
            "expected datatype FP32, got FP64",
        ),
        (request("fixed", "FP99", x=np.zeros((1, 3))), "INVALID_ARGUMENT", "'FP99'"),
        (
            request("fixed", z=np.zeros((1, 3), np.float32)),
            "INVALID_ARGUMENT",
            "unexpected inference input 'z'",
        ),
        (
            request("fixed", x=np.zeros((1, 3))),
            "INVALID_ARGUMENT",
            "expected 12 bytes for FP32 [1, 3], got 24",
        ),
        (request("gather", "INT64", x=np.array([9])), "INTERNAL", "out of data bounds"),
    ],
)
def test_refusals_of_infer(stub: Any, message: pb.ModelInferRequest, code: str, text: str) -> None:
    status, details = refused(stub.ModelInfer, message)
    assert status == code
    assert text in details


@pytest.mark.parametrize("name", ["ModelMetadata", "ModelConfig"])
def test_metadata_and_config_of_unknown_models_are_not_found(stub: Any, name: str) -> None:
    call, message = getattr(stub, name), getattr(pb, f"{name}Request")
    assert refused(call, message(name="nope"))[0] == "NOT_FOUND"
    assert refused(call, message(name="fixed", version="9"))[0] == "NOT_FOUND"
    assert refused(call, message(name="fixed", version="x"))[0] == "INVALID_ARGUMENT"


def test_model_ready_of_the_unknown_is_ok_and_false(stub: Any) -> None:
    assert stub.ModelReady(pb.ModelReadyRequest(name="fixed", version="1")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="nope")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="fixed", version="2")).ready
    assert refused(stub.ModelReady, pb.ModelReadyRequest(name="fixed", version="x"))[0] == "INVALID_ARGUMENT"


def test_malformed_protobuf_is_an_invalid_argument(channel: grpc.Channel) -> None:
    for method in ("ModelInfer", "ModelMetadata", "ModelReady", "ServerLive"):
        call: Any = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        code, details = refused(call, b"\x0a\xff\xff\xff\xff\x0fnot protobuf")
        assert code == "INVALID_ARGUMENT"
        assert f"malformed {method}Request" in details


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    call: Any = channel.unary_unary("/inference.GRPCInferenceService/NoSuchMethod")
    assert refused(call, b"")[0] == "UNIMPLEMENTED"


def test_a_request_over_the_limit_is_refused_and_the_server_goes_on(stub: Any) -> None:
    message = request("identity_fp32", x=np.zeros((25, 1_000_000), np.float32))
    code, details = refused(stub.ModelInfer, message)
    assert code == "RESOURCE_EXHAUSTED"
    assert "67108864" in details
    assert stub.ServerLive(pb.ServerLiveRequest()).live


def test_the_limit_grows_with_the_largest_declared_input(
    serve: Callable[..., RunningServer], tmp_path: Path, repository: Path
) -> None:
    target = tmp_path / "models" / "large"
    (target / "1").mkdir(parents=True)
    (target / "1" / "model.onnx").write_bytes(
        (repository / "identity_fp32" / "1" / "model.onnx").read_bytes()
    )
    (target / "config.pbtxt").write_text(
        'max_batch_size: 25 input { name: "x" data_type: TYPE_FP32 dims: 1000000 }'
    )
    server = serve("--model-repository", tmp_path / "models")
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.url, options=options) as channel:
        message = request("large", x=np.ones((25, 1_000_000), np.float32))
        response = GRPCInferenceServiceStub(channel).ModelInfer(message)
    assert response.raw_output_contents[0] == message.raw_input_contents[0]
    assert server.stop() == 0


def test_typed_contents_are_answered_raw(stub: Any) -> None:
    message = pb.ModelInferRequest(model_name="identity_int8", id="seven")
    tensor = message.inputs.add(name="x", datatype="INT8", shape=[1, 3])
    tensor.contents.int_contents.extend([-1, 0, 127])
    response = stub.ModelInfer(message)
    assert (response.model_name, response.model_version, response.id) == ("identity_int8", "1", "seven")
    assert not response.outputs[0].HasField("contents")
    array = decode_tensor("y", DATATYPES["INT8"], (1, 3), response.raw_output_contents[0])
    assert array.tolist() == [[-1, 0, 127]]


def test_server_metadata_names_tritons_extensions(stub: Any) -> None:
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert metadata.name == "onnxedge"
    assert metadata.version == __version__
    assert list(metadata.extensions) == [
        "classification", "sequence", "model_repository", "model_repository(unload_dependents)",
        "schedule_policy", "model_configuration", "system_shared_memory", "cuda_shared_memory",
        "binary_tensor_data", "parameters", "statistics", "trace", "logging",
    ]  # fmt: skip


def test_metadata_of_a_model_without_config_comes_from_the_graph(stub: Any) -> None:
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="versions"))
    assert (metadata.name, list(metadata.versions), metadata.platform) == (
        "versions", ["1", "2"], "onnxruntime_onnx",
    )  # fmt: skip
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 4])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("y", "FP32", [-1, 4])]
    assert metadata.properties["execution_providers"] == "CPUExecutionProvider"


def test_health_checks_the_server_and_each_model(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "inference.GRPCInferenceService", "fixed"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
    assert refused(health.Check, health_pb2.HealthCheckRequest(service="nope"))[0] == "NOT_FOUND"


def test_a_broken_model_is_not_serving_and_the_others_are(
    serve: Callable[..., RunningServer], broken_repository: Path
) -> None:
    server = serve("--model-repository", broken_repository)
    with grpc.insecure_channel(server.url) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        stub: Any = GRPCInferenceServiceStub(channel)

        def status(service: str) -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=service)).status)

        assert [status(name) for name in ("", "good", "corrupt")] == [NOT_SERVING, SERVING, NOT_SERVING]
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        code, details = refused(stub.ModelInfer, request("corrupt"))
        assert (code, "is no ONNX model" in details) == ("NOT_FOUND", True)
        assert str(broken_repository) not in details
        message = request("good", x=np.ones((1, 4), np.float32))
        assert stub.ModelInfer(message).raw_output_contents == message.raw_input_contents
    assert "is no ONNX model" in "".join(server.log)
    assert server.stop() == 0


def test_exit_on_error_exits(serve: Callable[..., RunningServer], broken_repository: Path) -> None:
    with pytest.raises(AssertionError, match="the server ended with 1 before it served"):
        serve("--model-repository", broken_repository, "--exit-on-error=true")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_and_describes_the_services(channel: grpc.Channel, version: str) -> None:
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed = next(iter(call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))))
    names = [service.name for service in listed.list_services_response.service]
    assert names == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    ]
    asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
    for answer in call(iter(asked)):
        assert answer.file_descriptor_response.file_descriptor_proto


def test_a_deadline_ends_a_run_on_the_server_too(stub: Any, server: RunningServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(slow_request(LONG), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # Both instances answer again: nothing runs for a client that has gone.
    for _ in range(4):
        stub.ModelInfer(slow_request(1), timeout=30)
    assert server.process.poll() is None


def test_a_cancelled_client_frees_its_instance(stub: Any) -> None:
    futures = [stub.ModelInfer.future(slow_request(LONG)) for _ in range(6)]
    for future in futures:
        future.cancel()
    stub.ModelInfer(slow_request(1), timeout=30)


def test_past_the_limit_the_answer_is_unavailable_at_once(
    serve: Callable[..., RunningServer], repository: Path
) -> None:
    server = serve("--model-repository", repository, "--max-inflight-requests=3")
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    with (
        grpc.insecure_channel(server.url) as channel,
        grpc.insecure_channel(server.url, own_connection) as second,
    ):
        stub: Any = GRPCInferenceServiceStub(channel)
        futures = [stub.ModelInfer.future(slow_request(LONG)) for _ in range(3)]
        wait_for_pending(server, "slow", 1)
        other: Any = GRPCInferenceServiceStub(second)
        code, details = refused(other.ModelInfer, slow_request(1))
        assert (code, "3 requests are in flight" in details) == ("UNAVAILABLE", True)
        assert other.ServerLive(pb.ServerLiveRequest()).live
        for future in futures:
            future.cancel()
        _until_accepted(other)
    assert server.stop() == 0


def _until_accepted(stub: Any) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            stub.ModelInfer(slow_request(1), timeout=5)
        except grpc.RpcError:
            assert time.monotonic() < end, "never accepted again"
        else:
            return


def test_drain_finishes_what_is_in_flight_and_refuses_what_comes(
    serve: Callable[..., RunningServer], repository: Path
) -> None:
    server = serve("--model-repository", repository)
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch: Iterator[Any] = health.Watch(health_pb2.HealthCheckRequest(service="fixed"))
        unknown: Iterator[Any] = health.Watch(health_pb2.HealthCheckRequest(service="nope"))
        assert next(watch).status == SERVING
        assert next(unknown).status == SERVICE_UNKNOWN
        # Three that end when they are cancelled, for two instances: behind them the fourth is sure to wait.
        long = [stub.ModelInfer.future(slow_request(LONG)) for _ in range(3)]
        wait_for_pending(server, "slow", 1)
        waiting = stub.ModelInfer.future(slow_request(1))
        wait_for_pending(server, "slow", 2)
        stopped: list[int] = []
        stopper = threading.Thread(target=lambda: stopped.append(server.stop()))
        stopper.start()
        assert next(watch).status == NOT_SERVING
        while stub.ServerReady(pb.ServerReadyRequest()).ready:  # health goes first, the refusals follow
            assert server.process.poll() is None
        code, details = refused(stub.ModelInfer, slow_request(1))
        assert (code, "shutting down" in details) == ("UNAVAILABLE", True)
        for future in long:
            future.cancel()
        assert waiting.result(timeout=60).outputs[0].name == "y"
        stopper.join()
    assert stopped == [0]
