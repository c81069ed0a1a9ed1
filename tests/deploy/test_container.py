"""The image as it is run: not root, on a root that can't be written to, what it answers and what it costs.

With `ONNXEDGE_DEPLOY_TESTS=1` and a Docker Engine that has the image, both of which
`deploy/docker/build_without_registry.sh` brings. The figures that documentation quotes are printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from serve import __version__
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import slow, write_model
from tests.serve.closed_loop import slow_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
DOCKER = shutil.which("docker") or "docker"
IMAGE = os.environ.get("ONNXEDGE_IMAGE", f"onnxedge:{__version__}")
HARDENED = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--memory=512m",
    "--pids-limit=256",
)
MOST_BYTES = 250_000_000
RECONNECTS_AT_ONCE = [("grpc.min_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 20)]
DRAINED = 3.0  # seconds that the request in flight takes, at least

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("ONNXEDGE_DEPLOY_TESTS") != "1",
        reason="ONNXEDGE_DEPLOY_TESTS is not 1: it needs a Docker Engine with the image",
    ),
    pytest.mark.skipif(not (MODELS / "mobilenet").is_dir(), reason="models/ is not there: make models"),
    pytest.mark.timeout(300),
]


def docker(*words: str | Path) -> str:
    done = subprocess.run(
        [DOCKER, *map(str, words)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Container:
    """One container of the image, hardened, on a network of its own."""

    def __init__(self, models: Path, network: str, *flags: str) -> None:
        begin = time.monotonic()
        ports = () if network == "none" else ("-p=127.0.0.1::8001", "-p=127.0.0.1::8002")
        mount = f"--volume={models}:/models:ro"
        self.id = docker(
            "run", "--detach", f"--network={network}", *ports, *HARDENED, mount, IMAGE, "serve", *flags
        )
        self.url, self.metrics_url = (
            ("", "")
            if network == "none"
            else tuple(docker("port", self.id, port) for port in ("8001", "8002"))
        )
        self.begin = begin

    def wait_until_ready(self) -> float:
        """Seconds from `docker run` to a server that is ready, asked by a client outside."""
        with grpc.insecure_channel(self.url, RECONNECTS_AT_ONCE) as channel:
            stub: Any = GRPCInferenceServiceStub(channel)
            while time.monotonic() - self.begin < 60:
                with contextlib.suppress(grpc.RpcError):
                    if stub.ServerReady(pb.ServerReadyRequest(), timeout=5).ready:
                        return time.monotonic() - self.begin
                time.sleep(0.02)
        raise AssertionError(docker("logs", self.id))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [DOCKER, "exec", self.id, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics_url}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def state(self) -> Any:
        return json.loads(docker("inspect", self.id))[0]["State"]

    def stop(self) -> None:
        docker("rm", "--force", self.id)


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    name = f"onnxedge-test-{os.getpid()}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name)


@pytest.fixture(scope="module")
def container(network: str) -> Iterator[Container]:
    container = Container(MODELS, network)
    container.wait_until_ready()
    yield container
    container.stop()


def test_tritonclient_gets_the_answers_of_the_server_outside_of_it(
    container: Container, serve: Callable[..., RunningServer]
) -> None:
    outside = serve("--model-repository", MODELS)
    script = ROOT / "tests" / "deploy" / "interop_container.py"
    command = [sys.executable, str(script), str(MODELS), container.url, outside.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert {"mobilenet", "resnet", "lstm", "gpt", "gpt_generate", "bert"} <= {*done.stdout.split()}


def test_it_is_small_starts_fast_and_takes_little_memory(
    network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = int(docker("image", "inspect", "--format={{.Size}}", IMAGE))
    seconds, memory = [], ""
    for _ in range(3):
        container = Container(MODELS, network)
        seconds.append(container.wait_until_ready())
        memory = docker("stats", "--no-stream", "--format={{.MemUsage}}", container.id)
        container.stop()
    with capsys.disabled():
        print(f"\n{IMAGE}: {size / 1e6:.0f} MB unpacked, ready {min(seconds):.1f} s after docker run")
        print(f"(three starts: {', '.join(f'{s:.1f}' for s in seconds)} s), memory then {memory}")
    assert size < MOST_BYTES


def test_it_is_nobody_in_particular_and_can_write_nowhere(container: Container) -> None:
    status = container.run("python", "-c", "print(open('/proc/1/status').read())").stdout
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert set(lines["Uid"].split()) == {"10001"}
    assert int(lines["CapEff"], 16) == 0
    assert lines["NoNewPrivs"].strip() == "1"
    for place in ("/file", "/models/file", "/tmp/file", "/opt/onnxedge/file"):  # noqa: S108 - inside the container
        assert "Read-only file system" in container.run("python", "-c", f"open({place!r}, 'w')").stderr
    assert container.run("sh", "-c", "true").returncode != 0, "there is a shell"


def test_the_engine_finds_it_healthy(container: Container) -> None:
    deadline = time.monotonic() + 30
    while container.state()["Health"]["Status"] != "healthy" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert container.state()["Health"]["Status"] == "healthy"
    assert container.run("onnxedge", "health", "bert").stdout == "SERVING\n"


def test_it_serves_without_any_network() -> None:
    alone = Container(MODELS, "none")
    deadline = time.monotonic() + 60
    while alone.run("onnxedge", "health").returncode != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alone.run("onnxedge", "health").stdout == "SERVING\n"
    words = ("onnxedge", "generate", "gpt_generate", "ROMEO:", "--max-tokens", "5")
    assert alone.run(*words).returncode == 0
    alone.stop()


def test_a_request_in_flight_is_answered_when_it_is_stopped(network: str, tmp_path: Path) -> None:
    write_model(tmp_path / "slow", slow())
    (tmp_path / "slow").chmod(0o755)
    tmp_path.chmod(0o755)
    container = Container(tmp_path, network)
    container.wait_until_ready()
    with grpc.insecure_channel(container.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        begin = time.monotonic()
        stub.ModelInfer(slow_request(1000), timeout=60)
        runs = int(1000 * DRAINED / (time.monotonic() - begin)) + 1000
        answer = stub.ModelInfer.future(slow_request(runs), timeout=120)
        while "onnxedge_inflight_requests 1" not in container.metrics():
            time.sleep(0.01)
        begin = time.monotonic()
        docker("stop", "--time=40", container.id)
        seconds = time.monotonic() - begin
        assert answer.result().outputs[0].shape == [128, 128]
    assert container.state()["ExitCode"] == 0
    assert 0.5 < seconds < 35, "the stop didn't wait, or waited until it was killed"
    container.stop()


def test_the_bill_of_materials_is_what_is_pinned(container: Container, tmp_path: Path) -> None:
    docker("cp", f"{container.id}:/usr/share/doc/onnxedge/sbom.cdx.json", tmp_path)
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    pinned = {
        f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
        for name, version in [line.split("==")]
    }
    python = {c["purl"] for c in bill["components"] if c["purl"].startswith("pkg:pypi/")}
    assert python - pinned == {f"pkg:pypi/onnxedge@{__version__}"}
    names = {component["name"] for component in bill["components"]}
    assert {"onnxruntime", "grpcio", "libc6", "libssl3"} <= names
    assert not names & {"torch", "onnx", "pip", "bash", "perl-base"}
