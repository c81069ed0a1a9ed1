"""A model repository of small real graphs, one for each thing that a server can meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import onnx
import pytest
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.conftest import RunningServer

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
FLOAT = TensorProto.FLOAT


def info(name: str, shape: Sequence[int | str | None] | None, onnx_type: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_type, shape)


def write_model(folder: Path, graph: onnx.GraphProto, version: int = 1) -> None:
    """Write FOLDER/VERSION/model.onnx."""
    target = folder / str(version)
    target.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, target / "model.onnx")


def identity(shape: Sequence[int | str | None], onnx_type: int = FLOAT) -> onnx.GraphProto:
    """y = x."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return helper.make_graph([node], "identity", [info("x", shape, onnx_type)], [info("y", shape, onnx_type)])


def scaled(factor: float) -> onnx.GraphProto:
    """y = factor · x, rows of 4."""
    constant = helper.make_tensor("factor", FLOAT, [], [factor])
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    return helper.make_graph([node], "scaled", [info("x", ["n", 4])], [info("y", ["n", 4])], [constant])


def addition() -> onnx.GraphProto:
    """sum = a + b and difference = a - b, rows of 3."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
    ]
    tensors = [info(name, ["n", 3]) for name in ("a", "b", "sum", "difference")]
    return helper.make_graph(nodes, "addition", tensors[:2], tensors[2:])


def slow() -> onnx.GraphProto:
    """Multiplies a 128 × 128 matrix by itself `n` times, about 0.1 ms each: runs as long as a test wants."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["m", "m"], ["p"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("m", [128, 128])],
        [info("go_on", [], TensorProto.BOOL), info("p", [128, 128])],
    )
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Loop", ["n", "", "zeros"], ["y"], body=body),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [128, 128])
    return helper.make_graph(
        nodes, "slow", [info("n", [], TensorProto.INT64)], [info("y", [128, 128])], [shape]
    )


def gather() -> onnx.GraphProto:
    """y = table[x] for a table of 4: an index out of range fails while the graph runs."""
    table = helper.make_tensor("table", FLOAT, [4], [0.0, 1.0, 2.0, 3.0])
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    return helper.make_graph(
        [node], "gather", [info("x", ["n"], TensorProto.INT64)], [info("y", ["n"])], [table]
    )


def sequence_output() -> onnx.GraphProto:
    """Answers a sequence of tensors, which the protocol can't carry."""
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    output = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    return helper.make_graph([node], "sequence", [info("x", ["n"])], [output])


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
        "unsupported_field": "dynamic_batching { }",
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
