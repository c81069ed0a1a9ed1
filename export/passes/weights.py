"""Constants of a graph, and the one definition of a matrix product with constant weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from typing_extensions import TypeIs

MATRIX = 2
PRODUCTS = ("Gemm", "MatMul")


class Product(NamedTuple):
    """A MatMul, or a Gemm that is just rows times weights plus a bias.

    Attributes:
        rows: the left operand.
        weight: the constant matrix; FP32 [inner, outer], or [outer, inner] when transposed.
        transposed: whether it is, by transB or by a Transpose in front of the node.
        bias: a Gemm's C, constant or not, of any shape that ONNX broadcasts; None without one.
    """

    rows: ir.Value
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None

    def matrix(self) -> np.ndarray:
        """The weights, FP32 [inner, outer]."""
        array = array_of(self.weight)
        return array.T if self.transposed else array


def find_product(node: ir.Node) -> Product | None:
    """What a node multiplies by which weights; None where it isn't such a product."""
    if node.op_type not in PRODUCTS or node.domain != "" or node.attributes.get_int("transA", 0) != 0:
        return None
    if any(node.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta")):
        return None
    rows, weight, bias = (*node.inputs, None)[:3]
    transposed = bool(node.attributes.get_int("transB", 0))
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "Transpose" and producer.domain == "":
        weight = producer.inputs[0]
        transposed ^= list(producer.attributes.get_ints("perm", (1, 0))) == [1, 0]
    if rows is None or not is_constant(weight) or array_of(weight).ndim != MATRIX:
        return None
    return Product(rows, weight, transposed, bias)


def is_constant(value: ir.Value | None) -> TypeIs[ir.Value]:
    """Whether a value is a constant of FP32 numbers, and no input that a client may set."""
    return (
        value is not None
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and not value.is_graph_input()
    )


def array_of(value: ir.Value | None) -> np.ndarray:
    """A constant's numbers."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def add_constant(graph: ir.Graph, name: str, array: ArrayLike) -> ir.Value:
    """Put a constant into a graph."""
    value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
    graph.register_initializer(value)
    return value
