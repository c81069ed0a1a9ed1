"""The metrics endpoint, read by a Prometheus parser."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from tests.conftest import RunningServer


def samples(server: RunningServer) -> dict[str, float]:
    """`name{labels}` to value, as on the wire: prometheus-client's parser renames counters."""
    text = server.metrics()
    assert list(text_string_to_metric_families(text)), "not Prometheus text"
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines)}


def test_counters_have_tritons_names_and_count_exactly(
    serve: Callable[..., RunningServer], repository: Path
) -> None:
    server = serve("--model-repository", repository)
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        request = pb.ModelInferRequest(model_name="batched")
        for name in ("a", "b"):
            request.inputs.add(name=name, datatype="FP32", shape=[3, 3])
            request.raw_input_contents.append(np.ones((3, 3), np.float32).tobytes())
        for _ in range(5):
            stub.ModelInfer(request)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(pb.ModelInferRequest(model_name="batched"))
    seen, labels = samples(server), '{model="batched",version="1"}'
    assert seen["nv_inference_request_success" + labels] == 5
    assert seen["nv_inference_count" + labels] == 15
    assert seen["nv_inference_exec_count" + labels] == 5
    assert seen["nv_inference_pending_request_count" + labels] == 0
    assert seen['nv_inference_request_failure{model="batched",version="1",reason="OTHER"}'] == 1
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    total = seen["nv_inference_request_duration_us" + labels]
    # Each part is rounded down to microseconds on its own.
    assert 0 <= total - sum(seen[f"nv_inference_{part}_duration_us" + labels] for part in parts) <= len(parts)
    assert seen["process_resident_memory_bytes"] > 0
    assert server.stop() == 0


def test_types_are_declared_under_the_names_of_the_samples(server: RunningServer) -> None:
    text = server.metrics()
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text


def test_only_metrics_is_there(server: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/")
    caught.value.close()


def test_metrics_can_be_switched_off(serve: Callable[..., RunningServer], repository: Path) -> None:
    server = serve("--model-repository", repository, "--allow-metrics=false")
    assert server.metrics_port == 0
    assert server.stop() == 0
