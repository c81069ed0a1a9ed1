"""The access log: a line a request, whatever clients send and however slow the disk is."""

from __future__ import annotations

import json
import signal
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from serve.observability.access_log import AccessLog, AccessRecord, line
from serve.observability.write_behind import WriteBehind
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.request import Call
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.conftest import RunningServer


def record(**fields: Any) -> AccessRecord:
    made = AccessRecord("ModelInfer", Call(), "ipv4:127.0.0.1:5", 10)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def wait_for(path: Path, lines: int) -> list[dict[str, Any]]:
    """The log's entries once it has so many; the server writes them a moment later."""
    until = time.monotonic() + 10
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < until, f"{path} has no {lines} lines"
        time.sleep(0.01)
    return entries(path)


def infer_request(rows: int, request_id: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="batched", id=request_id)
    for name in ("a", "b"):
        request.inputs.add(name=name, datatype="FP32", shape=[rows, 3])
        request.raw_input_contents.append(np.ones((rows, 3), np.float32).tobytes())
    return request


def test_nothing_that_a_client_sends_makes_a_line_of_its_own() -> None:
    text = line(record(request_id="a\nb\u2028c\x1b[2J" + "x" * 10_000, model='"}', error="\r\n" * 500), 0)
    assert text.isascii()
    assert text.count("\n") == 1
    assert len(text) < 3000
    entry = json.loads(text)
    assert entry["id"].startswith("a\nb\u2028c\x1b[2Jxxx")
    assert len(entry["id"]) == 257
    assert entry["model"] == '"}'


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--access-log .*no/access\.log"):
        AccessLog(str(tmp_path / "no" / "access.log"))


def test_lines_go_to_stderr_too(capfd: pytest.CaptureFixture[str]) -> None:
    log = AccessLog("-")
    log.record(record(code="OK"))
    log.close()
    assert json.loads(capfd.readouterr().err)["code"] == "OK"


def test_a_moved_file_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path))
    log.record(record(model="first"))
    wait_for(path, 1)
    path.rename(tmp_path / "access.log.1")
    log.record(record(model="second"))
    assert wait_for(path, 1)[0]["model"] == "second"
    log.close()
    assert entries(tmp_path / "access.log.1")[0]["model"] == "first"


class Stuck:
    """A sink that doesn't come back until it may."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.written: list[int] = []

    def write(self, items: Sequence[int]) -> None:
        self.may_go_on.wait(30)
        self.written += items

    def close(self) -> None:
        self.written.append(-1)


def test_a_stuck_disk_costs_lines_but_never_time() -> None:
    sink = Stuck()
    writer = WriteBehind("numbers", sink, 100)
    started = time.monotonic()
    for number in range(10_000):
        writer.put(number)
    assert time.monotonic() - started < 5
    sink.may_go_on.set()
    writer.close()
    # The first batch may have left the queue before it was full.
    assert 100 <= len(sink.written) - 1 <= 200
    assert len(sink.written) - 1 + writer.dropped == 10_000
    assert sink.written[-1] == -1
    assert sink.written[:-1] == sorted(sink.written[:-1])


def test_a_server_logs_every_request(
    serve: Callable[..., RunningServer], repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "access.log"
    server = serve("--model-repository", repository, f"--access-log={path}")
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        request = infer_request(3, "seven")
        answer = stub.ModelInfer(request)
        stub.ModelMetadata(pb.ModelMetadataRequest(name="scalar"))
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(pb.ModelInferRequest(model_name="nope", model_version="2"))
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(infer_request(9, "too large"))
        done, metadata, unknown, refused = wait_for(path, 4)
        path.rename(tmp_path / "access.log.1")
        server.process.send_signal(signal.SIGHUP)
        stub.ServerLive(pb.ServerLiveRequest())
    assert wait_for(path, 1)[0]["method"] == "ServerLive"
    assert server.stop() == 0
    assert {key: done[key] for key in ("method", "model", "version", "id", "code", "rows")} == {
        "method": "ModelInfer", "model": "batched", "version": "1", "id": "seven", "code": "OK", "rows": 3,
    }  # fmt: skip
    assert (done["request_bytes"], done["response_bytes"]) == (request.ByteSize(), answer.ByteSize())
    assert done["ms"] >= done["queue_ms"] + done["compute_ms"] > 0
    assert done["peer"].startswith("ipv4:127.0.0.1:")
    assert abs(datetime.now(UTC) - datetime.fromisoformat(done["time"])).total_seconds() < 120
    assert (metadata["method"], metadata["model"], metadata["code"]) == ("ModelMetadata", "scalar", "OK")
    assert (unknown["code"], unknown["model"], unknown["version"]) == ("NOT_FOUND", "nope", "2")
    assert "unknown model" in unknown["error"]
    assert (refused["code"], refused["id"]) == ("INVALID_ARGUMENT", "too large")


def test_each_request_of_a_stream_has_a_line(
    serve: Callable[..., RunningServer], repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "access.log"
    server = serve("--model-repository", repository, f"--access-log={path}")
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        requests = [infer_request(rows, f"rows {rows}") for rows in (1, 9, 2)]
        answers = list(stub.ModelStreamInfer(iter(requests)))
    assert server.stop() == 0
    logged = {entry["id"]: entry for entry in entries(path)}
    assert list(logged) == ["rows 1", "rows 9", "rows 2"]
    assert [entry["code"] for entry in logged.values()] == ["OK", "INVALID_ARGUMENT", "OK"]
    assert {entry["method"] for entry in logged.values()} == {"ModelStreamInfer"}
    assert logged["rows 2"]["response_bytes"] == answers[2].ByteSize()
    assert logged["rows 2"]["peer"].startswith("ipv4:127.0.0.1:")


def test_a_client_that_goes_away_is_logged_as_such(
    serve: Callable[..., RunningServer], repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "access.log"
    server = serve("--model-repository", repository, f"--access-log={path}")
    request = pb.ModelInferRequest(model_name="slow")
    request.inputs.add(name="n", datatype="INT64", shape=[])
    request.raw_input_contents.append(np.int64(100_000).tobytes())
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(request, timeout=0.3)
    assert wait_for(path, 1)[0]["code"] in {"CANCELLED", "DEADLINE_EXCEEDED"}
    assert server.stop() == 0
