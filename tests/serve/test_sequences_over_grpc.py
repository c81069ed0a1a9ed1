"""Sequences of a stateful LSTM on a real server, driven by tritonclient."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.graphs import write_model
from tests.serve import stateful_lstm

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

CLIENT = Path(__file__).parent / "interop_sequences.py"
# Longer than any pause of a busy machine, and short enough to wait for.
IDLE_FOR_EVER, IDLE_SOON = 60_000_000, 3_000_000


def write_step(folder: Path, strategy: str, idle_microseconds: int, max_batch_size: int = 8) -> None:
    write_model(folder, stateful_lstm.step())
    config = stateful_lstm.CONFIG % (max_batch_size, idle_microseconds, strategy)
    (folder / "config.pbtxt").write_text(config + "instance_group { count: 1 kind: KIND_CPU }")


def ask(server: RunningServer, *arguments: str, text: str = "") -> Any:
    done = subprocess.run(
        [sys.executable, CLIENT, server.url, *arguments],
        input=text, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def live(server: RunningServer, model: str) -> int:
    found = re.search(
        rf'^onnxedge_live_sequences{{model="{model}",version="1"}} (\d+)', server.metrics(), re.MULTILINE
    )
    assert found is not None
    return int(found[1])


def wait_until_none_lives(server: RunningServer, model: str) -> None:
    give_up = time.monotonic() + 60
    while live(server, model):
        assert time.monotonic() < give_up, "the state of sequences that nobody has is still there"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]) -> RunningServer:
    root = tmp_path_factory.mktemp("sequences")
    write_step(root / "direct", "direct { }", IDLE_FOR_EVER)
    write_step(root / "oldest", "oldest { max_candidate_sequences: 32 }", IDLE_FOR_EVER)
    write_step(root / "single", "direct { }", IDLE_FOR_EVER, 1)
    return serve("--model-repository", root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    return ort.InferenceSession(write_model(tmp_path_factory.mktemp("whole"), stateful_lstm.whole()))


@pytest.mark.parametrize(
    ("mode", "model", "at_once"),
    [("sync", "direct", 24), ("sync", "oldest", 24), ("stream", "direct", 8), ("stream", "oldest", 16)],
)
def test_interleaved_sequences_equal_the_whole_ones(
    mode: str, model: str, at_once: int, server: RunningServer, whole: ort.InferenceSession
) -> None:
    random = np.random.default_rng(5)
    lengths = random.integers(1, 8, 96)
    sequences = [random.normal(0, 1, (length, 3)).astype(np.float32) for length in lengths]
    answers = ask(server, mode, model, str(at_once), text=json.dumps([rows.tolist() for rows in sequences]))
    for rows, got in zip(sequences, answers, strict=True):
        (expected,) = whole.run(["y"], {"x": rows[:, np.newaxis]})
        np.testing.assert_allclose(got, expected[:, 0, 0], rtol=0, atol=1e-6)
    wait_until_none_lives(server, model)  # by their END: none of them is idle for long enough


def test_what_is_refused_is_refused_as_in_triton(server: RunningServer) -> None:
    seen = ask(server, "refusals", "direct")
    expected = {
        "no_id": "must specify a non-zero or non-empty correlation ID",
        "no_start": "sequence 901 to model 'direct' must specify the START flag on the first request",
        "two_rows": "must specify batch-size 1",
        "state": "'h'",
        "kept_output": "'h_out'",
    }
    for case, message in expected.items():
        assert seen[case][0] == "StatusCode.INVALID_ARGUMENT", case
        assert message in seen[case][1]
    assert [code for code, _ in seen["after_the_end"]] == ["OK", "StatusCode.INVALID_ARGUMENT"]
    assert [tensor["name"] for tensor in seen["metadata"]["inputs"]] == ["x"]
    assert [tensor["name"] for tensor in seen["metadata"]["outputs"]] == ["y"]
    assert seen["config"]["max_sequence_idle_microseconds"] == str(IDLE_FOR_EVER)


def test_what_waits_too_long_in_the_backlog_is_unavailable(server: RunningServer) -> None:
    code, message = ask(server, "backlog", "single")
    assert code == "StatusCode.UNAVAILABLE"
    assert "timeout of the corresponding sequence has been expired" in message


def test_a_killed_client_leaves_no_state(tmp_path: Path, serve: Callable[..., RunningServer]) -> None:
    write_step(tmp_path / "step", "oldest { max_candidate_sequences: 32 }", IDLE_SOON)
    server = serve("--model-repository", tmp_path, "--max-live-sequences=20")
    client = subprocess.Popen(
        [sys.executable, CLIENT, server.url, "vanish", "step"], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    with client.stdout:
        code, message = json.loads(client.stdout.readline())
        assert (code, "20 live sequences" in message) == ("StatusCode.UNAVAILABLE", True)
        assert 0 < live(server, "step") <= 20
        client.kill()
        client.wait()
    wait_until_none_lives(server, "step")
    seen = ask(server, "refusals", "step")
    assert seen["after_the_end"][0][0] == "OK"
    assert server.stop() == 0
