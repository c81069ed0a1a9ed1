"""Which nodes of a graph static quantization takes, and which values it rounds for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from export.passes.weights import array_of, find_product, is_constant

if TYPE_CHECKING:
    from collections.abc import Iterator

PRODUCTS = ("Conv", "Gemm", "MatMul")
TABLE = "Gather"
ACTIVATIONS = ("Relu", "Clip")
# What stands between convolutions and has an integer kernel, or only moves numbers. Elsewhere the same
# operators stay float: around a transformer's residual sums and softmax they would cost accuracy and, for the
# rounding back and forth, time (2.7 against 2.1 ms for a BERT of 4 layers).
BETWEEN_CONVOLUTIONS = (
    *ACTIVATIONS, "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "Split", "Slice", "Pad", "Resize",
    "MaxPool", "AveragePool", "GlobalAveragePool",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze",
)  # fmt: skip


def weighted_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Convolutions and matrix products with constant weights, and lookups in constant tables."""
    return [node for node in graph if is_product(node) or is_table(node)]


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies by constant weights, and adds a bias of one constant per column if any.

    Others onnxruntime's quantizer rounds wrong or not at all, such as a Gemm with a scale of its own.
    """
    if node.op_type == "Conv" and node.domain == "":
        return all(is_constant(value) for value in node.inputs[1:] if value is not None)
    product = find_product(node)
    if product is None or product.weight is not node.inputs[1]:
        return False
    columns = product.matrix().shape[1:]
    return product.bias is None or (is_constant(product.bias) and array_of(product.bias).shape == columns)


def is_table(node: ir.Node) -> bool:
    """Whether a node picks rows of a constant table, such as an embedding's."""
    if node.op_type != TABLE or node.domain != "" or not is_constant(node.inputs[0]):
        return False
    table = node.inputs[0]
    return table is not None and table.shape is not None and len(table.shape) > 1


def quantizable_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The weighted nodes, and what stands between convolutions, in the graph's order."""
    after_convolution: set[ir.Value] = set()
    nodes = []
    for node in graph:  # in topological order
        if is_product(node) or is_table(node):
            nodes.append(node)
            if node.op_type == "Conv":
                after_convolution.update(node.outputs)
        elif node.op_type in BETWEEN_CONVOLUTIONS and node.inputs[0] in after_convolution:
            if not _is_answer(node):
                nodes.append(node)
            after_convolution.update(node.outputs)
    return nodes


def with_activation(node: ir.Node) -> list[ir.Node]:
    """A node, and the activation that the quantizer makes part of it, if one follows."""
    users = node.outputs[0].consumers()
    if len(users) != 1 or users[0].op_type not in ACTIVATIONS or node.outputs[0].is_graph_output():
        return [node]
    return [node] if _is_answer(users[0]) else [node, users[0]]


def _is_answer(node: ir.Node) -> bool:
    """Whether it is an activation that the quantizer leaves to the rounding, which outputs go without."""
    return node.op_type in ACTIVATIONS and node.outputs[0].is_graph_output()


def rounded_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that may be rounded, once: what quantizable nodes take and give, constants excepted."""
    seen: set[ir.Value] = set()
    for node in quantizable_nodes(graph):
        for value in (*node.inputs, *node.outputs):
            if value is None or value in seen or value.const_value is not None:
                continue
            seen.add(value)
            if value.dtype == ir.DataType.FLOAT:
                yield value
