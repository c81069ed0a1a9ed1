"""Model repositories, good and broken, and one server of the good one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from tests.graphs import (
    ONNX_TYPES,
    addition,
    gather,
    identity,
    scaled,
    sequence_output,
    slow,
    write_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models alone, most of them with no config at all."""
    root = tmp_path_factory.mktemp("models")
    for name, onnx_type in ONNX_TYPES.items():
        write_model(root / f"identity_{name.lower()}", identity(["n", "m"], onnx_type))
    write_model(root / "scalar", identity([]))
    write_model(root / "fixed", identity([1, 3]))
    write_model(root / "slow", slow())
    write_model(root / "gather", gather())
    write_model(root / "versions", scaled(1), 1)
    write_model(root / "versions", scaled(2), 2)
    (root / "versions" / "config.pbtxt").write_text("version_policy { all {} }")
    write_model(root / "batched", addition())
    (root / "batched" / "config.pbtxt").write_text('name: "batched" backend: "onnxruntime" max_batch_size: 4')
    write_model(root / "labelled", identity(["n", 3]))
    (root / "labelled" / "config.pbtxt").write_text(
        'max_batch_size: 8 output { name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }'
    )
    (root / "labelled" / "labels.txt").write_text("cat\ndog\n")
    return root


@pytest.fixture(scope="session")
def broken_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good model among models that can't be loaded, each for a reason of its own."""
    root = tmp_path_factory.mktemp("broken")
    write_model(root / "good", scaled(1))
    (root / "corrupt" / "1").mkdir(parents=True)
    (root / "corrupt" / "1" / "model.onnx").write_bytes(b"this is no protobuf")
    (root / "missing_file" / "1").mkdir(parents=True)
    (root / "no_version").mkdir()
    write_model(root / "sequence_output", sequence_output())
    for name, config in {
        "bad_text": "max_batch_size: lots",
        "unsupported_field": "ensemble_scheduling { }",
        "wrong_name": 'name: "other"',
        "wrong_type": 'input { name: "x" data_type: TYPE_INT8 dims: [-1, 4] }',
        "wrong_shape": 'input { name: "x" data_type: TYPE_FP32 dims: [-1, 5] }',
        "wrong_output": 'output { name: "z" data_type: TYPE_FP32 dims: [-1, 4] }',
        "no_labels": 'output { name: "y" data_type: TYPE_FP32 dims: [-1, 4] label_filename: "labels.txt" }',
    }.items():
        write_model(root / name, scaled(1))
        (root / name / "config.pbtxt").write_text(config)
    (root / ".hidden" / "1").mkdir(parents=True)
    return root


@pytest.fixture(scope="session")
def server(repository: Path, serve: Callable[..., RunningServer]) -> RunningServer:
    """One server of the good models, for all tests that leave it as they found it."""
    return serve("--model-repository", repository)


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.url) as channel:
        yield channel
