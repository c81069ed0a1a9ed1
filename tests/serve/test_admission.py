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


GIB = 1 << 30


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("0::/\n", {"memory.max": "max\n"}, 8 * GIB),
        ("0::/\n", {"memory.max": f"{16 * GIB}\n"}, 8 * GIB),
        ("0::/\n", {}, 8 * GIB),
        ("", {}, 8 * GIB),
        # A service of systemd, and one whose slice has the limit.
        ("0::/system.slice/a.service\n", {"system.slice/a.service/memory.max": f"{GIB}\n"}, GIB),
        ("0::/s/a\n", {"s/memory.max": f"{GIB}\n", "s/a/memory.max": f"{2 * GIB}\n"}, GIB),
        ("0::/seen/from/outside\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("4:memory:/box\n", {"memory/box/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 * GIB),
        ("4:cpu:/\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, 8 * GIB),
    ],
)
def test_the_memory_is_the_cgroups_or_the_machines(
    tmp_path: Path, lines: str, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(lines)
    (tmp_path / "meminfo").write_text("MemFree:  1 kB\nMemTotal:  8388608 kB\n")
    assert memory_limit(tmp_path / "sys", tmp_path / "own", tmp_path / "meminfo") == expected


def test_memory_that_nothing_tells_of_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit(tmp_path, tmp_path / "none", tmp_path / "none") == 0
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
