"""Small real ONNX graphs, one for each thing that a server can meet, and how to put one into a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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


def write_model(folder: Path, graph: onnx.GraphProto, version: int = 1) -> Path:
    """Write FOLDER/VERSION/model.onnx; its path."""
    target = folder / str(version)
    target.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, target / "model.onnx")
    return target / "model.onnx"


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


def multiplication() -> onnx.GraphProto:
    """A Loop's body that multiplies a 128 × 128 matrix by itself."""
    return helper.make_graph(
        [helper.make_node("MatMul", ["m", "m"], ["p"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("m", [128, 128])],
        [info("go_on", [], TensorProto.BOOL), info("p", [128, 128])],
    )


def slow() -> onnx.GraphProto:
    """Multiplies a 128 × 128 matrix by itself `n` times, about 0.1 ms each: runs as long as a test wants."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Loop", ["n", "", "zeros"], ["y"], body=multiplication()),
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
