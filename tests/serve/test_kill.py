"""SIGKILL under load: the next start serves, nothing on disk is damaged, no process stays behind."""

from __future__ import annotations

import hashlib
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import identity, slow, write_model
from tests.serve.closed_loop import OWN_CONNECTION, ClosedLoop, slow_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

ROUNDS = 4
ROOT = Path(__file__).parents[2]
ENDLESS = """
model_warmup {
  name: "days" batch_size: 1
  inputs { key: "n" value { data_type: TYPE_INT64 input_data_file: "n" } }
}
"""
# Plenty: by then it computes.
SECONDS_OF_IMPORTS = 3.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    write_model(root / "slow", slow())
    write_model(root / "echo", identity(["n", "m"]))
    (root / "echo" / "config.pbtxt").write_text('name: "echo" backend: "onnxruntime"')
    return root


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the servers put temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def contents(root: Path) -> dict[str, str]:
    """Each file's checksum."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Reloads:
    """A client that loads `echo` with another graph, over and over, until the server is gone."""

    def __init__(self, url: str, graph: bytes) -> None:
        self.count = 0
        self._url = url
        self._graph = graph
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_for(self, count: int) -> None:
        """Return when so many loads have succeeded; the next one is under way then."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, 60)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        request = pb.RepositoryModelLoadRequest(model_name="echo")
        request.parameters["config"].string_param = '{"backend": "onnxruntime"}'
        request.parameters["file:1/model.onnx"].bytes_param = self._graph
        with grpc.insecure_channel(self._url, OWN_CONNECTION) as channel:
            stub: Any = GRPCInferenceServiceStub(channel)
            while True:
                try:
                    stub.RepositoryModelLoad(request, timeout=60)
                except grpc.RpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 - the end
                    return
                with self._changed:
                    self.count += 1
                    self._changed.notify_all()


def answers(server: RunningServer) -> bool:
    with grpc.insecure_channel(server.url, OWN_CONNECTION) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        return bool(stub.ModelInfer(slow_request(1), timeout=60).outputs)


def processes_of(temporary: Path) -> list[str]:
    """Command lines of processes that were started with this folder for temporary files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={temporary}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
        except OSError:  # it has ended, or is another user's
            continue
    return found


def test_sigkill_under_load_damages_nothing(
    serve: Callable[..., RunningServer], models: Path, temporary: Path
) -> None:
    before = contents(models)
    graph = (models / "echo" / "1" / "model.onnx").read_bytes()
    flags = ("--model-repository", models, "--model-control-mode=explicit", "--load-model=*")
    for round_number in range(ROUNDS):
        server = serve(*flags)
        assert answers(server)
        load, reload = ClosedLoop(server.url), Reloads(server.url, graph)
        reload.wait_for(1)
        load.wait_for(len(load.outcomes.answered) + 10 * round_number)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        outcomes = load.stop()
        reload.join()
        assert {code for code, _ in outcomes.refused} <= {"UNAVAILABLE"}
        assert contents(models) == before
        _until_gone(temporary)
    # What a load in progress had unpacked may stay, and is nobody's business any more.
    assert all(left.name.startswith("onnxedge-") for left in temporary.iterdir())
    server = serve(*flags)
    assert answers(server)
    assert server.stop() == 0
    assert contents(models) == before


def _until_gone(temporary: Path) -> None:
    """The throw-away processes that check graphs end with the server, at the latest with their time."""
    end = time.monotonic() + 60
    while left := processes_of(temporary):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_sigterm_ends_a_server_that_is_still_loading(tmp_path: Path) -> None:
    write_model(tmp_path / "endless", slow())
    (tmp_path / "endless" / "config.pbtxt").write_text(ENDLESS)
    (tmp_path / "endless" / "warmup").mkdir()
    (tmp_path / "endless" / "warmup" / "n").write_bytes(struct.pack("<q", 10**9))
    flags = (f"--model-repository={tmp_path}", "--grpc-port=0", "--allow-metrics=false")
    with subprocess.Popen(
        [sys.executable, "-m", "serve", "serve", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        end = time.monotonic() + 60
        # Linux: the clock of another process's CPU time.
        while time.clock_gettime((~process.pid << 3) | 2) < SECONDS_OF_IMPORTS:
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
        assert "stopped while models were being loaded" in process.stderr.read()
