"""NVIDIA's own client, unchanged, against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunningServer

CLIENT = Path(__file__).with_name("interop_tritonclient.py")


@pytest.fixture(scope="module")
def seen(server: RunningServer) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, CLIENT, server.url], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    observed: dict[str, Any] = json.loads(done.stdout)
    return observed


def test_health(seen: dict[str, Any]) -> None:
    names = ("live", "ready", "model_ready", "version_ready", "unknown_ready")
    assert [seen[name] for name in names] == [True, True, True, True, False]


def test_server_metadata(seen: dict[str, Any]) -> None:
    assert seen["server"]["name"] == "onnxedge"
    assert "classification" in seen["server"]["extensions"]


def test_model_metadata(seen: dict[str, Any]) -> None:
    tensors = {"datatype": "FP32", "shape": ["-1", "4"]}
    assert seen["metadata"] == {
        "name": "versions",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", **tensors}],
        "outputs": [{"name": "y", **tensors}],
    }


def test_every_datatype_comes_back_as_it_went(seen: dict[str, Any]) -> None:
    assert len(seen["datatypes"]) == 13
    assert all(seen["datatypes"].values()), seen["datatypes"]
    assert seen["text"] == [["héé", ""]]


def test_infer(seen: dict[str, Any]) -> None:
    assert seen["answer"] == [[1.0, 2.0, 3.0, 4.0]]
    assert seen["response"] == ["1", "seven"]
    assert seen["outputs"] == [["sum"], [[2.0] * 3] * 2]
    assert seen["classes"] == [["0.500000:1:dog", "0.250000:0:cat"]]
    assert seen["async"] == seen["compressed"] == [[2.0, 4.0, 6.0, 8.0]]


@pytest.mark.parametrize(
    ("case", "status", "text"),
    [
        ("unknown_model", "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        ("unknown_version", "NOT_FOUND", "version 9"),
        ("bad_version", "INVALID_ARGUMENT", "'x' is not a version number"),
        ("wrong_shape", "INVALID_ARGUMENT", "expected shape [-1, 4], got [1, 9]"),
        ("missing_input", "INVALID_ARGUMENT", "each of the inputs ['x'] once"),
        ("unknown_output", "INVALID_ARGUMENT", "unexpected inference output 'z'"),
        ("too_late", "DEADLINE_EXCEEDED", ""),
        ("unknown_metadata", "NOT_FOUND", "'nope'"),
    ],
)
def test_refusals_have_tritons_codes(seen: dict[str, Any], case: str, status: str, text: str) -> None:
    assert seen[case][0] == f"StatusCode.{status}"
    assert text in seen[case][1]


def test_sequence_parameters_of_a_stateless_model_are_ignored(seen: dict[str, Any]) -> None:
    assert seen["sequence_flags"] == ["OK", ""]


def test_model_config_is_completed(seen: dict[str, Any]) -> None:
    config = seen["config"]
    assert (config["name"], config["platform"], config["backend"]) == (
        "labelled", "onnxruntime_onnx", "onnxruntime",
    )  # fmt: skip
    assert (config["max_batch_size"], config["default_model_filename"]) == (8, "model.onnx")
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}]
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert config["instance_group"][0]["count"] >= 1
    assert seen["unknown_config"][0] == "StatusCode.NOT_FOUND"


def test_repository_index(seen: dict[str, Any]) -> None:
    index = [(model["name"], model["version"], model["state"]) for model in seen["index"]]
    assert ("versions", "1", "READY") in index
    assert ("versions", "2", "READY") in index


def test_statistics_count_requests_rows_and_runs_apart(seen: dict[str, Any]) -> None:
    # One more request of one row came from the classification.
    found = seen["statistics"]
    assert (found["inference_count"], found["execution_count"]) == ("6", "5")
    assert (found["inference_stats"]["success"]["count"], found["inference_stats"]["fail"]["count"]) == (
        "5",
        "1",
    )
    assert {b["batch_size"]: b["compute_infer"]["count"] for b in found["batch_stats"]} == {
        "1": "4",
        "2": "1",
    }
    assert int(found["last_inference"]) > 1_700_000_000_000
    assert seen["unknown_statistics"] == [
        "StatusCode.INVALID_ARGUMENT", "requested model 'nope' is not available",
    ]  # fmt: skip
