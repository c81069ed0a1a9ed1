"""Traces: which requests are taken, what a trace says, and who may change the settings."""

from __future__ import annotations

import http.server
import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from serve.errors import InvalidArgumentError, UnsupportedError
from serve.observability.observation import Observer
from serve.observability.trace_config import parse_trace_config
from serve.observability.trace_file import TraceFile
from serve.observability.trace_settings import TraceScope, TraceSettings
from serve.observability.tracing import Tracer, TraceRecord
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, InferResponse, Tensor
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

CLIENT = Path(__file__).with_name("interop_diagnostics.py")
NAMES = [
    "GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "REQUEST_START", "QUEUE_START", "COMPUTE_START",
    "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END", "INFER_RESPONSE_COMPLETE", "REQUEST_END",
    "GRPC_SEND_START", "GRPC_SEND_END",
]  # fmt: skip


def settings(*flags: str) -> TraceSettings:
    return TraceSettings(parse_trace_config(["triton,file=trace.json", "level=TIMESTAMPS", *flags]))


def ask(server: RunningServer, request_id: str = "", metadata: Any = None, model: str = "batched") -> None:
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    for name in ("a", "b"):
        request.inputs.add(name=name, datatype="FP32", shape=[1, 3])
        request.raw_input_contents.append(np.array([0.1, 1, 2], np.float32).tobytes())
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        stub.ModelInfer(request, metadata=metadata)


def by_id(entries: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    ordered = sorted(entries, key=lambda entry: int(entry["id"]))
    return {key: list(group) for key, group in itertools.groupby(ordered, key=lambda entry: int(entry["id"]))}


# The command line


def test_flags_are_read_as_triton_reads_them() -> None:
    config = parse_trace_config(
        [
            "triton,file=a,b=c.json",
            "triton,log-frequency=50",
            "rate=100",
            "level=TENSORS",
            "level=TIMESTAMPS",
            "count=7",
        ]
    )
    assert (config.mode, config.file) == ("triton", "a,b=c.json")
    assert config.defaults == TraceScope(("TIMESTAMPS", "TENSORS"), 100, 7, 50)
    assert parse_trace_config([]).defaults == TraceScope((), 1000, -1, 0)
    other = parse_trace_config(
        ["mode=opentelemetry", "opentelemetry,url=http://h:1/v1/traces", "opentelemetry,resource=a.b=c=d"]
    )
    assert (other.options, other.resource) == ({"url": "http://h:1/v1/traces"}, {"a.b": "c=d"})


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("rate", "expected NAME=VALUE"),
        ("rate=-1", "'rate': expected a whole number from 0"),
        ("rate=1e3", "'rate'"),
        ("count=99999999999", "'count'"),
        ("level=ALL", "expected OFF, TIMESTAMPS or TENSORS"),
        ("colour=blue", "unknown setting 'colour'"),
        ("jaeger,url=x", "expected mode triton or opentelemetry"),
        ("mode=jaeger", "expected triton or opentelemetry"),
        ("triton,file=/no/such/folder/trace.json", "there is no folder /no/such/folder"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(flag: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        parse_trace_config([flag])


def test_opentelemetry_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingsError, match=r"onnxedge\[tracing\]"):
        Tracer(["mode=opentelemetry"])


# Settings, global and per model


def test_every_nth_request_until_the_count_is_used_up() -> None:
    traced = settings("rate=3", "count=2")
    taken = [number for number in range(1, 13) if traced.take("m", forced=False)]
    assert taken == [3, 6]
    assert not traced.active
    traced.update("", {"count": 1})
    assert traced.active


def test_a_client_with_a_trace_of_its_own_is_followed_whatever_the_rate() -> None:
    flags = ["mode=opentelemetry", "level=TIMESTAMPS", "rate=0"]
    traced = TraceSettings(parse_trace_config(flags))
    assert traced.active
    assert traced.take("m", forced=False) is None
    assert traced.take("m", forced=True) is not None


def test_model_settings_fall_back_to_the_global_ones_key_by_key() -> None:
    traced = settings("rate=1")
    traced.update("m", {"rate": 12, "log_frequency": 34})
    traced.update("", {"rate": 56, "count": 78, "level": ()})
    model = traced.scope("m")
    assert (model.rate, model.count, model.log_frequency, model.level) == (12, 78, 34, ())
    assert traced.scope("other").rate == 56
    traced.update("", {"rate": None, "count": None, "level": None})
    assert traced.scope("m").count == -1
    traced.update("m", {"rate": None})
    assert (traced.scope("m").rate, traced.scope("m").log_frequency) == (1, 34)
    traced.update("m", {"log_frequency": None})
    assert traced.scope("m") is traced.scope("")


def test_a_change_that_would_break_one_model_changes_nothing() -> None:
    traced = settings("rate=5")
    traced.update("m", {"level": ("TIMESTAMPS",)})
    with pytest.raises(InvalidArgumentError, match="sample rate must be non-zero"):
        traced.update("", {"rate": 0, "level": ()})
    assert (traced.scope("").rate, traced.scope("").level) == (5, ("TIMESTAMPS",))


def test_without_a_file_nothing_can_be_switched_on() -> None:
    tracer = Tracer([])
    assert not tracer.active
    with pytest.raises(InvalidArgumentError, match="trace file name is not given"):
        tracer.update("", {"trace_level": ["TIMESTAMPS"]})
    with pytest.raises(UnsupportedError):
        tracer.update("", {"trace_file": ["/tmp/x"]})  # noqa: S108 - to be refused
    assert not tracer.active


# Files


def record(number: int, log_frequency: int = 0) -> TraceRecord:
    return TraceRecord(number, 'm"', 1, "x\n", log_frequency, [("REQUEST_START", 5)])


def test_a_trace_file_is_whole_after_each_batch(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(str(path))
    for number in (1, 2):
        file.write([record(number)])
        entries = json.loads(path.read_text())
        assert [entry["id"] for entry in entries] == [i for i in range(1, number + 1) for _ in range(2)]
    assert entries[0] == {"id": 1, "model_name": 'm"', "model_version": 1, "request_id": "x\n"}
    assert entries[1] == {"id": 1, "timestamps": [{"name": "REQUEST_START", "ns": 5}]}
    file.close()
    assert json.loads(path.read_text()) == entries


def test_log_frequency_numbers_the_files(tmp_path: Path) -> None:
    file = TraceFile(str(tmp_path / "trace.json"))
    file.write([record(number, 2) for number in range(1, 6)])
    file.close()
    found = {path.name: len(by_id(json.loads(path.read_text()))) for path in tmp_path.iterdir()}
    assert found == {"trace.json.0": 2, "trace.json.1": 2, "trace.json.2": 1}


def test_trace_files_are_bounded(tmp_path: Path) -> None:
    file = TraceFile(str(tmp_path / "trace.json"), max_bytes=250)
    file.write([record(1)])
    with pytest.raises(OSError, match="limit"):
        file.write([record(2), record(3)])
    file.close()
    assert (tmp_path / "trace.json").stat().st_size <= 252


def traced_once(path: Path, *tensors: Tensor, answer: Any = None) -> list[dict[str, Any]]:
    """The entries of one request with these inputs, and the first as the output."""
    tracer = Tracer([f"triton,file={path}", "level=TENSORS", "rate=1"])
    observed = Observer(tracer, None).begin("ModelInfer", Call(), 0, "", None)
    observed.parsed(InferRequest("m", "", tensors, id="seven"))
    if answer is None:
        observed.answered(InferResponse("m", "3", "seven", tensors[:1]), 0)
    else:
        observed.failed(*answer)
    observed.finish()
    observed.finish()
    tracer.close()
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return entries


def test_tensors_are_written_as_triton_writes_them_and_cut(tmp_path: Path) -> None:
    def tensor(name: str, array: np.ndarray) -> Tensor:
        return Tensor(name, DATATYPES[name], array)

    texts = np.array([b'a"b', b"\xff" + b"x" * 1000], object)
    head, *entries = traced_once(
        tmp_path / "trace.json",
        tensor("FP32", np.array([[0.1, 2]], np.float32)),
        tensor("BOOL", np.array([True, False])),
        tensor("INT64", np.arange(5000).reshape(50, 100)),
        tensor("FP16", np.ones(2, np.float16)),
        tensor("BYTES", texts),
    )
    assert head == {"id": 1, "model_name": "m", "model_version": 3, "request_id": "seven"}
    data = {entry["tensor"]["dtype"]: entry["tensor"]["data"] for entry in entries[:-1]}
    assert (data["FP32"], data["BOOL"], data["FP16"]) == ("0.1,2.0", "1,0", "")
    assert data["INT64"] == ",".join(map(str, range(1024)))
    assert entries[2]["tensor"]["shape"] == "50,100"
    assert data["BYTES"].startswith('"a"b","\\xffxxx')
    assert len(data["BYTES"]) < 300
    assert [entry["activity"] for entry in entries] == ["TENSOR_QUEUE_INPUT"] * 5 + ["TENSOR_BACKEND_OUTPUT"]


def test_a_request_that_failed_is_traced_as_far_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    tracer = Tracer([f"triton,file={path}", "level=TIMESTAMPS", "rate=1"])
    observed = Observer(tracer, None).begin("ModelInfer", Call(), 0, "", None)
    observed.parsed(InferRequest("m", "9", ()))
    observed.finish()  # the client went away before the answer
    observed.failed("NOT_FOUND", "no version 9")
    tracer.close()
    head, *entries = json.loads(path.read_text())
    assert head["model_version"] == 9
    names = [entry["timestamps"][0]["name"] for entry in entries]
    assert names == [name for name in NAMES if "COMPUTE" not in name and name != "INFER_RESPONSE_COMPLETE"]


def test_what_cannot_be_written_is_counted_and_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    tracer = Tracer([f"triton,file={folder}/trace.json", "level=TIMESTAMPS", "rate=1"])
    folder.rmdir()
    for _ in range(3000):
        trace = tracer.sample("m")
        assert trace is not None
        trace.finish(Call())
    tracer.close()
    assert tracer.dropped == 3000


# The whole server


@pytest.fixture(scope="module")
def traced_server(
    serve: Callable[..., RunningServer], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, Path]]:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    flags = ("--trace-config=rate=2", "--trace-config=level=TIMESTAMPS")
    server = serve("--model-repository", repository, f"--trace-config=triton,file={path}", *flags)
    yield server, path
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def seen(traced_server: tuple[RunningServer, Path]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, CLIENT, traced_server[0].url, "traces"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    observed: dict[str, Any] = json.loads(done.stdout)
    return observed


def test_tritonclient_reads_changes_and_clears_settings(
    seen: dict[str, Any], traced_server: tuple[RunningServer, Path]
) -> None:
    initial = {
        "trace_file": [str(traced_server[1])],
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": ["2"],
        "trace_count": ["-1"],
        "log_frequency": ["0"],
        "trace_mode": ["triton"],
    }
    assert seen["initial"] == seen["initial_model"] == initial
    assert seen["global_cleared"] == initial | {"trace_level": ["OFF"]}
    assert seen["model_kept"] == initial | {
        "trace_level": ["OFF"], "trace_rate": ["12"], "log_frequency": ["34"],
    }  # fmt: skip
    assert seen["model_cleared"] == initial | {"trace_level": ["OFF"], "log_frequency": ["34"]}
    assert seen["levels"] == seen["model_follows"] == initial | {"trace_level": ["TIMESTAMPS", "TENSORS"]}
    assert seen["restored"] == seen["after_refusals"] == initial


@pytest.mark.parametrize(
    ("case", "status", "text"),
    [
        ("file", "UNIMPLEMENTED", "trace file location can not be updated through network protocol"),
        ("file_cleared", "UNIMPLEMENTED", "trace file location"),
        ("mode", "UNIMPLEMENTED", "trace mode"),
        ("rate", "INVALID_ARGUMENT", "'trace_rate'"),
        ("rate_zero", "INVALID_ARGUMENT", "sample rate must be non-zero"),
        ("count", "INVALID_ARGUMENT", "'trace_count'"),
        ("level", "INVALID_ARGUMENT", "'EVERYTHING'"),
        ("off_and_more", "INVALID_ARGUMENT", "only one trace level"),
        ("two_rates", "INVALID_ARGUMENT", "expect only 1 value for 'trace_rate'"),
        ("unknown", "INVALID_ARGUMENT", "unknown trace setting 'trace_colour'"),
        ("model", "INVALID_ARGUMENT", "Request for unknown model : nope"),
    ],
)
def test_settings_that_cannot_be_are_refused(seen: dict[str, Any], case: str, status: str, text: str) -> None:
    assert seen[f"refused_{case}"][0] == f"StatusCode.{status}"
    assert text in seen[f"refused_{case}"][1]


def test_naming_the_mode_that_is_changes_nothing(seen: dict[str, Any]) -> None:
    assert seen["same_mode"] == ["OK", ""]


@pytest.mark.usefixtures("seen")
def test_a_server_writes_every_second_request(traced_server: tuple[RunningServer, Path]) -> None:
    server, path = traced_server
    for number in range(6):
        ask(server, f"request {number}")
    assert server.stop() == 0
    traces = by_id(json.loads(path.read_text()))
    assert [entries[0]["request_id"] for entries in traces.values()] == [
        "request 1",
        "request 3",
        "request 5",
    ]
    for head, *entries in traces.values():
        assert (head["model_name"], head["model_version"]) == ("batched", 1)
        stamps = [entry["timestamps"][0] for entry in entries]
        assert [stamp["name"] for stamp in stamps] == NAMES
        times = [stamp["ns"] for stamp in stamps]
        assert times == sorted(times)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes what an OpenTelemetry exporter sends."""

    bodies: queue.Queue[bytes]

    def do_POST(self) -> None:
        self.bodies.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Not worth a line."""


@pytest.fixture
def collector() -> Iterator[tuple[str, queue.Queue[bytes]]]:
    bodies: queue.Queue[bytes] = queue.Queue()
    server = http.server.HTTPServer(("127.0.0.1", 0), type("Handler", (Collector,), {"bodies": bodies}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_opentelemetry_spans_arrive_at_a_collector(
    serve: Callable[..., RunningServer], repository: Path, collector: tuple[str, queue.Queue[bytes]]
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # noqa: PLC0415 - an optional package

    url, bodies = collector
    flags = [
        "mode=opentelemetry", "level=TIMESTAMPS", "rate=1000", f"opentelemetry,url={url}",
        "opentelemetry,resource=service.name=shop",
    ]  # fmt: skip
    server = serve("--model-repository", repository, *(f"--trace-config={flag}" for flag in flags))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    ask(server, "not followed")
    before = time.time_ns()
    ask(server, "seven", metadata=[("traceparent", f"00-{trace_id}-{parent}-01")])
    after = time.time_ns()
    assert server.stop() == 0
    resource = trace_service_pb2.ExportTraceServiceRequest.FromString(bodies.get(timeout=10)).resource_spans[
        0
    ]
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "shop"
    spans = {span.name: span for span in resource.scope_spans[0].spans}
    assert set(spans) == {"InferRequest", "batched", "queue", "compute"}
    root, model = spans["InferRequest"], spans["batched"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (trace_id, parent)
    assert model.parent_span_id == root.span_id
    assert spans["compute"].parent_span_id == spans["queue"].parent_span_id == model.span_id
    attributes = {attribute.key: attribute.value for attribute in model.attributes}
    assert attributes["triton.model_name"].string_value == "batched"
    assert attributes["triton.model_version"].int_value == 1
    assert attributes["triton.request_id"].string_value == "seven"
    assert [event.name for event in spans["compute"].events] == [n for n in NAMES if n.startswith("COMPUTE")]
    assert before < root.start_time_unix_nano <= model.start_time_unix_nano < model.end_time_unix_nano
    assert model.end_time_unix_nano <= root.end_time_unix_nano < after + 1_000_000_000
