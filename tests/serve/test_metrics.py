"""The metrics endpoint, read by a Prometheus parser."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.observability.histogram import latencies
from serve.observability.metrics import MetricsServer
from serve.observability.system_usage import SystemUsage
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import addition, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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


def families(server: RunningServer) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(server.metrics())}


def test_types_are_declared_under_the_names_of_the_samples(server: RunningServer) -> None:
    text = server.metrics()
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text
    assert "# TYPE onnxedge_batch_size histogram\n" in text


def infer(server: RunningServer, *rows: int) -> None:
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        for size in rows:
            request = pb.ModelInferRequest(model_name="tagged")
            for name in ("a", "b"):
                request.inputs.add(name=name, datatype="FP32", shape=[size, 3])
                request.raw_input_contents.append(np.ones((size, 3), np.float32).tobytes())
            stub.ModelInfer(request)


@pytest.fixture(scope="module")
def tagged(serve: Callable[..., RunningServer], tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    """A server of one model with metric tags, not all of them a label's name, after five requests."""
    root = tmp_path_factory.mktemp("tagged")
    write_model(root / "tagged", addition())
    (root / "tagged" / "config.pbtxt").write_text(
        """max_batch_size: 300
        metric_tags { key: "team" value: "vi\\"sion\\n" }
        metric_tags { key: "9 lives-" value: "yes" }
        metric_tags { key: "model" value: "stolen" }"""
    )
    server = serve("--model-repository", root)
    infer(server, 1, 1, 3, 4, 300)
    return server


def test_metric_tags_become_labels(tagged: RunningServer) -> None:
    for name in ("nv_inference_count", "onnxedge_batch_size", "onnxedge_queue_depth"):
        for sample in families(tagged)[name].samples:
            labels = {key: value for key, value in sample.labels.items() if key != "le"}
            assert labels == {
                "model": "tagged", "version": "1", "team": 'vi"sion\n', "tag_9_lives_": "yes",
            }  # fmt: skip


def test_histograms_count_exactly(tagged: RunningServer) -> None:
    found = families(tagged)
    sizes = {s.labels.get("le", s.name): s.value for s in found["onnxedge_batch_size"].samples}
    assert sizes == {
        "1": 2, "2": 2, "4": 4, "8": 4, "16": 4, "32": 4, "64": 4, "128": 4, "256": 4, "+Inf": 5,
        "onnxedge_batch_size_sum": 309, "onnxedge_batch_size_count": 5,
    }  # fmt: skip
    latency = found["onnxedge_request_duration_seconds"].samples
    buckets = [s.value for s in latency if s.name.endswith("_bucket")]
    bounds = [float(s.labels["le"]) for s in latency if s.name.endswith("_bucket")]
    rest = {s.name.rsplit("_", 1)[1]: s.value for s in latency if not s.name.endswith("_bucket")}
    assert buckets == sorted(buckets)
    assert bounds == sorted(bounds)
    assert buckets[-1] == rest["count"] == 5
    microseconds = next(s.value for s in found["nv_inference_request_duration_us"].samples)
    assert rest["sum"] * 1e6 == pytest.approx(microseconds, abs=1)


def test_a_latency_falls_into_the_bucket_that_holds_it() -> None:
    counts = [0] * 64
    for nanoseconds in (0, 1, 2**17 - 1, 2**17, 2**20, 2**36 - 1, 2**36, 2**62):
        counts[nanoseconds.bit_length()] += 1
    buckets = {float(bound): value for suffix, bound, value in latencies(counts, 0) if suffix == "_bucket"}
    assert buckets[(2**17 - 1) / 1e9] == 3
    assert buckets[(2**18 - 1) / 1e9] == buckets[(2**20 - 1) / 1e9] == 4
    assert buckets[(2**21 - 1) / 1e9] == 5
    assert buckets[(2**36 - 1) / 1e9] == 6
    assert buckets[float("inf")] == 8


def test_where_a_model_runs_and_what_the_server_uses(tagged: RunningServer) -> None:
    found = families(tagged)
    providers = {s.labels["provider"]: s.value for s in found["onnxedge_model_provider_info"].samples}
    assert providers["CPUExecutionProvider"] == 1
    nodes = {s.labels["provider"]: s.value for s in found["onnxedge_model_nodes"].samples}
    assert sum(nodes.values()) == 2
    values = {s.name: s.value for family in found.values() for s in family.samples}
    assert 0 <= values["nv_cpu_utilization"] <= 1
    assert 0 < values["nv_cpu_memory_used_bytes"] < values["nv_cpu_memory_total_bytes"]
    for name in (
        "onnxedge_live_sequences", "onnxedge_queue_depth", "onnxedge_inflight_requests",
        "onnxedge_inflight_bytes", "onnxedge_dropped_access_log_lines_total", "onnxedge_dropped_traces_total",
    ):  # fmt: skip
        assert values[name] == 0
    assert values["onnxedge_model_memory_bytes"] >= 0


def test_usage_is_read_from_proc_and_is_0_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SystemUsage(tmp_path / "no").memory_bytes() == (0, 0)
    assert SystemUsage(tmp_path / "no").cpu_utilization() == 0
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 40 kB\n")
    (tmp_path / "stat").write_text("cpu 10 0 10 70 10 0 0 0 5 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    usage = SystemUsage(tmp_path)
    assert usage.memory_bytes() == (100 * 1024, 60 * 1024)
    monkeypatch.setattr("serve.observability.system_usage._LEAST_INTERVAL_SECONDS", 0)
    (tmp_path / "stat").write_text("cpu 25 0 15 130 30 0 0 0 20 0\n")
    assert usage.cpu_utilization() == pytest.approx(20 / 100)


# The endpoint


def test_only_metrics_is_there(server: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/")
    caught.value.close()


def test_only_get_is_answered(server: RunningServer) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        connection = http.client.HTTPConnection("127.0.0.1", server.metrics_port, timeout=10)
        connection.request(method, "/metrics")
        assert connection.getresponse().status == 501
        connection.close()


def test_metrics_can_be_switched_off(serve: Callable[..., RunningServer], repository: Path) -> None:
    server = serve("--model-repository", repository, "--allow-metrics=false")
    assert server.metrics_port == 0
    assert server.stop() == 0


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_slow_clients_take_up_a_few_threads_and_not_for_long() -> None:
    endpoint = MetricsServer("127.0.0.1", 0, lambda: b"up 1\n", seconds=1.5)
    endpoint.start()
    try:
        assert scrape(endpoint.port) == "up 1\n"
        slow = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(8)]
        for connection in slow:
            connection.sendall(b"GET /metr")
        with pytest.raises((urllib.error.HTTPError, urllib.error.URLError, ConnectionError)) as refused:
            scrape(endpoint.port)
        if isinstance(refused.value, urllib.error.HTTPError):
            assert refused.value.code == 503
            refused.value.close()
        for connection in slow:
            connection.settimeout(10)
            assert connection.recv(1) == b"", "cut by the server"
            connection.close()
        assert scrape(endpoint.port) == "up 1\n"
        assert sum(thread.name.startswith("metrics_") for thread in threading.enumerate()) <= 8
    finally:
        endpoint.close()


def test_a_scrape_that_fails_says_so_and_the_next_one_works() -> None:
    answers: Iterator[bytes | Exception] = iter([ValueError("broken"), b"up 1\n"])

    def render() -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    endpoint = MetricsServer("127.0.0.1", 0, render)
    endpoint.start()
    try:
        with pytest.raises(urllib.error.HTTPError, match="500") as caught:
            scrape(endpoint.port)
        caught.value.close()
        assert scrape(endpoint.port) == "up 1\n"
    finally:
        endpoint.close()
