"""How much may be in the server at once: requests, and their bytes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from serve.admission import Admission, default_byte_limit, memory_limit
from serve.errors import UnavailableError
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import identity, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer


def test_past_the_number_of_requests_the_answer_names_the_flag() -> None:
    admission = Admission(2)
    admission.enter()
    admission.enter()
    with pytest.raises(UnavailableError, match="--max-inflight-requests"):
        admission.enter()
    admission.leave()
    admission.enter()
    assert admission.inflight == 2


def test_past_the_bytes_the_answer_names_the_flag_but_one_alone_may_be_larger() -> None:
    admission = Admission(10, 100)
    admission.enter(150)
    with pytest.raises(UnavailableError, match="--max-inflight-bytes"):
        admission.enter(1)
    admission.leave(150)
    admission.enter(60)
    admission.enter(40)
    assert (admission.inflight, admission.inflight_bytes) == (2, 100)
    with pytest.raises(UnavailableError, match="100 bytes, this one 1, the limit is 100"):
        admission.enter(1)


def test_closing_waits_for_those_inside() -> None:
    admission = Admission(10)
    admission.enter()
    assert not admission.close(0)
    with pytest.raises(UnavailableError, match="shutting down"):
        admission.enter()
    leaving = threading.Thread(target=admission.leave)
    leaving.start()
    assert admission.close(30)
    leaving.join()


@pytest.mark.parametrize(
    ("limit", "expected"), [("1073741824\n", 1 << 30), ("max\n", 4096 << 10), (None, 4096 << 10)]
)
def test_the_memory_is_the_cgroups_or_the_machines(tmp_path: Path, limit: str | None, expected: int) -> None:
    cgroup, meminfo = tmp_path / "memory.max", tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4096 kB\n" if expected < 1 << 30 else "MemTotal:  8388608 kB\n")
    if limit is not None:
        cgroup.write_text(limit)
    assert memory_limit(cgroup, meminfo) == expected
    assert default_byte_limit() >= 64 << 20


def test_large_requests_at_once_are_refused_and_the_server_goes_on(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    write_model(tmp_path / "echo", identity(["n"]))
    server = serve("--model-repository", tmp_path, "--max-inflight-bytes=4194304")
    message = pb.ModelInferRequest(model_name="echo")
    message.inputs.add(name="x", datatype="FP32", shape=[900_000])
    message.raw_input_contents.append(np.zeros(900_000, np.float32).tobytes())
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(message) for _ in range(16)]
        codes = [call.code() for call in calls]
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.OK in codes
        assert stub.ModelInfer.future(message).code() is grpc.StatusCode.OK
    assert server.stop() == 0
