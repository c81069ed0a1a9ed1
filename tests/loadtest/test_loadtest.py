"""The load test against the real server, and its figures against known ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadtest.latency import LatencyRecorder
from loadtest.payload import request_bytes
from serve.pb import grpc_service_pb2 as pb
from serve.protocol.codec import decode_infer_request
from serve.protocol.datatypes import DATATYPES
from tests.graphs import scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]) -> RunningServer:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "tiny", scaled(1))
    return serve("--model-repository", root, "--max-request-bytes=4096")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def reported(output: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d.]+)", output, re.MULTILINE)
    assert found, output
    return float(found[1])


def server_count(server: RunningServer) -> float:
    line = re.search(r"^nv_inference_request_success\{.*\} (\d+)$", server.metrics(), re.MULTILINE)
    assert line
    return float(line[1])


def test_the_closed_loop_reports_what_the_server_counted(target: RunningServer) -> None:
    before = server_count(target)
    done = run("loadtest", "--model=tiny", "--users=4", "--duration=2", f"--url={target.url}")
    assert done.returncode == 0, done.stderr
    answered, throughput = reported(done.stdout, "requests answered"), reported(done.stdout, "throughput")
    # Per second of the time that it really took: 2 s, or more on a machine that is busy elsewhere.
    assert answered / 4 < throughput <= answered / 2 * 1.01
    # The server also answered the warm-up, and what was on its way when the time was up.
    assert answered <= server_count(target) - before
    p50, p90, p99 = (reported(done.stdout, name) for name in ("p50", "p90", "p99"))
    assert 0 < p50 <= p90 <= p99 <= reported(done.stdout, "max")
    assert reported(done.stdout, "failed") == 0
    # Little's law: of four users at most four are waiting, and most of them most of the time.
    assert 2 < throughput * reported(done.stdout, "mean") / 1000 <= 4.2


def test_failures_are_counted_by_status(target: RunningServer) -> None:
    # 1000 rows of 4 floats are over the 4096 bytes that this server takes.
    flags = ("--model=tiny", "--users=1", "--duration=1", "--batch-size=1000", f"--url={target.url}")
    done = run("loadtest", *flags)
    assert done.returncode == 1
    assert reported(done.stdout, "requests answered") == 0
    assert reported(done.stdout, "  RESOURCE_EXHAUSTED") == reported(done.stdout, "failed") > 0


def test_an_unknown_model_is_reported(target: RunningServer) -> None:
    done = run("loadtest", "--model=nope", f"--url={target.url}")
    assert (done.returncode, "NOT_FOUND" in done.stderr) == (1, True)


def test_a_count_of_nothing_is_refused() -> None:
    done = run("loadtest", "--model=tiny", "--users=0")
    assert (done.returncode, "--users is 0, expected more than 0" in done.stderr) == (2, True)


def test_the_locustfile_runs_under_locust(target: RunningServer) -> None:
    done = run(
        "locust", "-f", "loadtest/locustfile.py", "--host", target.url, "--model", "tiny",
        "--headless", "-u", "2", "-r", "2", "-t", "1s", "--only-summary",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"gRPC +tiny +\d{2,} +0\(0.00%\)", done.stderr + done.stdout)


def test_locust_ends_with_one_line_where_the_model_is_not(target: RunningServer) -> None:
    done = run(
        "locust", "-f", "loadtest/locustfile.py", "--host", target.url, "--model", "nope",
        "--headless", "-u", "1", "-t", "60s",
    )  # fmt: skip
    output = done.stderr + done.stdout
    assert (done.returncode, "Traceback" in output) == (1, False)
    assert "NOT_FOUND: Request for unknown model: 'nope'" in output


def test_percentiles_are_those_of_the_samples() -> None:
    recorder = LatencyRecorder()
    samples = np.random.default_rng(0).exponential(0.4, 20_000)
    for sample in samples:
        recorder.record(float(sample))
    for percent in (50, 90, 99):
        exact = float(np.percentile(samples, percent))
        assert recorder.percentile(percent) == pytest.approx(exact, rel=0.01, abs=0.002)


@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_a_request_can_be_made_for_every_datatype(datatype: str) -> None:
    spec: Any = pb.ModelMetadataResponse.TensorMetadata(name="x", datatype=datatype, shape=[-1, 3, -1])
    metadata = pb.ModelMetadataResponse(name="m", inputs=[spec])
    decoded = decode_infer_request(request_bytes(metadata, batch=4))
    assert decoded.inputs[0].array.shape == (4, 3, 1)
    assert request_bytes(metadata, batch=4) == request_bytes(metadata, batch=4)


def test_a_fixed_first_dimension_is_kept() -> None:
    spec = pb.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[2, 3])
    decoded = decode_infer_request(request_bytes(pb.ModelMetadataResponse(name="m", inputs=[spec]), batch=4))
    assert decoded.inputs[0].array.shape == (2, 3)
