"""What stands between matrix products, on matrices too."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import PassResult
from export.passes.weights import MATRIX, add_constant

ELEMENTWISE = frozenset((
    "Abs", "Add", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu",
    "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh",
))  # fmt: skip
LAST_AXIS_OPSET = 13
"""The opset from which Softmax and Split take the last axis by -1, and Softmax that axis alone."""


class FlatRows:
    """Keep [batch, time, width] as [batch * time, width] from one product to the next.

    `export.passes.bias_products.BiasProducts` flattens the rows in front of each product and restores their
    axes behind it. Residual sums, layer norms and activations treat each row by itself and can stay flat:
    the pairs of Reshape between them go (29 of 56 in a BERT of 4 layers, for 1 or 2 % of its time in int8),
    and products of the same rows share one QuantizeLinear. The axes are restored for the operators that look
    at more than the last one. A sum is flattened only if both its sides have the same axes, by number or by
    name.
    """

    name: ClassVar[str] = "flat_rows"

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        if (opset := model.opset_imports.get("", 0)) < LAST_AXIS_OPSET:
            return f"needs opset {LAST_AXIS_OPSET}, the graph has {opset}"
        if not any(_is_split_matrix(node) for node in model.graph):
            return "no matrix gets more axes"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        before = _reshapes(model.graph)
        flattener = _Flattener(model.graph)
        for node in tuple(model.graph):
            flattener.visit(node)
        common.RemoveUnusedNodesPass()(model)
        return PassResult(model, {"reshapes left out": before - _reshapes(model.graph)})


def _reshapes(graph: ir.Graph) -> int:
    return sum(node.op_type == "Reshape" for node in graph)


def _is_split_matrix(node: ir.Node) -> bool:
    """Whether a Reshape splits the first axis of a matrix and leaves the last one as it is."""
    if node.op_type != "Reshape" or node.domain != "":
        return False
    matrix, result = node.inputs[0], node.outputs[0]
    if matrix is None or matrix.shape is None or result.shape is None:
        return False
    width = _width(result)
    return len(matrix.shape) == MATRIX < len(result.shape) and width is not None and _width(matrix) == width


def _width(value: ir.Value) -> int | None:
    """The size of the last axis, where it is a number above 0."""
    size = value.shape[-1] if value.shape else None
    return size if isinstance(size, int) and size > 0 else None


def _axes(value: ir.Value) -> tuple[int | str, ...] | None:
    """The sizes of all axes, numbers or names; None if one has neither."""
    if value.shape is None:
        return None
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _keeps_numbers_order(reshape: ir.Node) -> bool:
    """Whether the target alone says the result's shape: without zeros that stand for an input's axis."""
    target = reshape.inputs[1]
    constant = target.const_value if target is not None else None
    return reshape.attributes.get_int("allowzero", 0) == 1 or (
        constant is not None and bool((constant.numpy() != 0).all())
    )


def _works_by_row(node: ir.Node) -> bool:
    """Whether a node's result for a row depends on that row alone, constants along the last axis aside."""
    value = node.inputs[0] if node.inputs else None
    if node.domain != "" or len(node.outputs) != 1 or value is None or value.shape is None:
        return False
    if node.op_type in ELEMENTWISE:
        return True
    axis = node.attributes.get_int("axis", -1)
    return node.op_type in {"LayerNormalization", "Softmax"} and axis in {-1, len(value.shape) - 1}


def _stays_flat(value: ir.Value) -> bool:
    """Whether some user of a value could take its matrix."""
    return any(user.op_type == "Reshape" or _works_by_row(user) for user in value.consumers())


class _Flattener:
    """Goes through a graph in order, and knows each value's matrix and how to give it back its axes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._matrices: dict[ir.Value, ir.Value] = {}
        self._targets: dict[ir.Value, ir.Value] = {}
        self._flat_targets: dict[int, ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        """Let a node take matrices, if it can and one of its inputs has one."""
        if node.op_type == "Reshape" and node.domain == "":
            self._reshape(node)
        elif not any(value in self._targets for value in node.inputs if value is not None):
            return
        elif node.op_type == "Split":
            self._split(node)
        elif _works_by_row(node):
            self._compute(node)

    def _reshape(self, node: ir.Node) -> None:
        value, target = node.inputs[:2]
        assert value is not None
        assert target is not None
        if _is_split_matrix(node):
            self._matrices[node.outputs[0]], self._targets[node.outputs[0]] = value, target
            return
        if not _keeps_numbers_order(node):
            return
        width = _width(value)
        flattens = target.const_value is not None and target.const_value.numpy().tolist() == [-1, width]
        if flattens and value in self._matrices and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(self._matrices[value])
            return
        if flattens:
            self._matrices[value] = node.outputs[0]
        producer = value.producer()
        if producer is not None and producer.op_type == "Reshape":
            node.replace_input_with(0, producer.inputs[0])

    def _split(self, node: ir.Node) -> None:
        """Split matrices by columns, if whatever takes the parts gives them new axes anyway."""
        value = node.inputs[0]
        axis = node.attributes.get_int("axis", 0)
        if value not in self._targets or value is None or value.shape is None:
            return
        users = [user for part in node.outputs for user in part.consumers()]
        if (
            axis not in {-1, len(value.shape) - 1}
            or any(part.is_graph_output() for part in node.outputs)
            or not all(user.op_type == "Reshape" and _keeps_numbers_order(user) for user in users)
        ):
            return
        node.replace_input_with(0, self._matrices[value])
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
        for part in node.outputs:
            part.shape = ir.Shape([None, _width(part)])

    def _compute(self, node: ir.Node) -> None:
        """Compute on matrices, and give the result its axes back for whoever wants them."""
        old = node.outputs[0]
        example = next(value for value in node.inputs if value is not None and value in self._targets)
        if _axes(old) is None or not all(self._fits(value, old, example) for value in node.inputs):
            return
        if any(self._is_new(value) for value in node.inputs) and not _stays_flat(old):
            return
        attributes = {**node.attributes}
        if node.op_type not in ELEMENTWISE:
            attributes["axis"] = ir.AttrInt64("axis", -1)
        inputs = [self._flat(node, value) for value in node.inputs]
        name = f"{old.name}.matrix"
        flat = ir.node(node.op_type, inputs, attributes, name=node.name, outputs=[ir.val(name)])
        matrix = flat.outputs[0]
        matrix.type, matrix.shape = old.type, ir.Shape([None, _width(old)])
        target = self._targets[example]
        restored = ir.node("Reshape", [matrix, target], name=f"{node.name}.restored")
        new = restored.outputs[0]
        self._graph.insert_before(node, [flat, restored])
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        self._matrices[new], self._targets[new] = matrix, target

    def _fits(self, value: ir.Value | None, result: ir.Value, example: ir.Value) -> bool:
        """Whether an input has the result's axes, or is the same for each row."""
        if value is None:
            return True
        if value.shape is None:
            return False
        if len(value.shape) < MATRIX:
            return True
        return _axes(value) == _axes(result) == _axes(example)

    def _is_new(self, value: ir.Value | None) -> bool:
        """Whether an input would have to become a matrix first."""
        has_axes = value is not None and value.shape is not None and len(value.shape) >= MATRIX
        return has_axes and value not in self._matrices

    def _flat(self, before: ir.Node, value: ir.Value | None) -> ir.Value | None:
        if value is None or value.shape is None or len(value.shape) < MATRIX:
            return value
        if value not in self._matrices:
            name = f"{value.name}.rows"
            inputs = [value, self._flat_target(_width(value))]
            node = ir.node("Reshape", inputs, name=name, outputs=[ir.val(f"{name}.value")])
            self._graph.insert_before(before, node)
            matrix = node.outputs[0]
            matrix.type, matrix.shape = value.type, ir.Shape([None, _width(value)])
            self._matrices[value] = matrix
        return self._matrices[value]

    def _flat_target(self, width: int | None) -> ir.Value:
        assert width is not None
        if width not in self._flat_targets:
            sizes = np.array([-1, width], np.int64)
            self._flat_targets[width] = add_constant(self._graph, f"flat_rows_of_{width}", sizes)
        return self._flat_targets[width]
