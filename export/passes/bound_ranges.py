"""Ranges that don't depend on the batch, for an LSTM that is to be quantized dynamically.

Dynamic quantization takes a range over a whole tensor, and with it a row's answer from the rows beside it.
Here each such tensor gets two more columns, one at the lower and one at the upper bound of what it can hold,
which meet zeros among the weights. The range is then the same in every batch, and a row's integers are, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from export.int8.calibration import extremes
from export.passes import PassResult
from export.passes.dynamic_int8 import QUANTIZED, is_quantizable
from export.passes.weights import add_constant, array_of, find_product

if TYPE_CHECKING:
    from collections.abc import Mapping

MARGIN = 1.5
"""The bound is so much above the largest value among the calibration rows; what lies above it is clipped."""
SATURATED = 30.0  # a gate's sum at which sigmoid and tanh are 1 in FP32
SENTINELS = 2
UNSUPPORTED = ("activations", "clip", "input_forget", "layout")


@dataclass(frozen=True)
class BoundRanges:
    """Fix the ranges that `DynamicInt8` will find; to be applied to the float graph before it.

    What goes into an LSTM or a product is clipped to what the calibration rows reached, by a margin. The
    hidden state is bounded by two units more, whose gates biases hold open: with a state that starts at zero,
    a cell's value after n steps is between -n and n and theirs is just that, so that no unit's output
    tanh(cell) passes theirs.

    At batch 1 it makes the integer graph of LSTM(128) 15 % slower, of LSTM(64) 26 %.

    Attributes:
        calibration: input name to rows [n, ...] as a client sends them.
    """

    name: ClassVar[str] = "bound_ranges"

    calibration: Mapping[str, np.ndarray]

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        operators = {node.op_type for node in model.graph}
        if operators.intersection(QUANTIZED):
            return "the graph is quantized already"
        lstms = [node for node in model.graph if node.op_type == "LSTM"]
        if not lstms:
            return "the graph has no LSTM"
        if not all(_is_plain(node) for node in lstms):
            return "an LSTM has lengths, peepholes or attributes whose ranges aren't known"
        if not all(_is_known(node.inputs[0]) for node in model.graph if is_quantizable(node)):
            return "the rank of what goes into an LSTM or a product isn't known"
        if missing := {str(value.name) for value in model.graph.inputs} - set(self.calibration):
            return f"no calibration rows for input {', '.join(map(repr, sorted(missing)))}"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        graph = model.graph
        nodes = [node for node in graph if is_quantizable(node)]
        values = [value for node in nodes if (value := node.inputs[0]) is not None]
        names = list(dict.fromkeys(str(value.name) for value in values))
        _, reached = extremes(ir.to_proto(model), names, self.calibration, None)
        bounded: dict[ir.Value, ir.Value] = {}
        for node, value in zip(nodes, values, strict=True):
            if value not in bounded:
                bound = MARGIN * max(map(abs, reached[str(value.name)])) or 1.0
                bounded[value] = _bounded(graph, node, value, bound)
            node.replace_input_with(0, bounded[value])
            if node.op_type == "LSTM":
                _widen_lstm(graph, node)
            else:
                _widen_product(graph, node)
        return PassResult(model, {"tensors bounded": len(bounded)})


def _is_known(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None


def _is_plain(node: ir.Node) -> bool:
    if not is_quantizable(node) or any(name in node.attributes for name in UNSUPPORTED):
        return False
    unknown = (4, 7)  # sequence_lens and P
    return all(len(node.inputs) <= index or node.inputs[index] is None for index in unknown)


def _widen_lstm(graph: ir.Graph, node: ir.Node) -> None:
    """Two units that answer the largest and the least that a unit can, and that no unit listens to."""
    hidden = node.attributes.get_int("hidden_size", 0)
    directions, _, features = array_of(node.inputs[1]).shape
    for index, columns in ((1, features), (2, hidden)):
        gates = array_of(node.inputs[index]).reshape(directions, 4, hidden, columns)
        _set_weight(graph, node, index, _pad(gates, (2, 3)).reshape(directions, -1, columns + SENTINELS))
    node.resize_inputs(max(4, len(node.inputs)))  # a missing B may also be left out at the end
    bias = np.zeros((directions, 8 * hidden), np.float32)
    bias = bias if node.inputs[3] is None else array_of(node.inputs[3])
    bias = _pad(bias.reshape(directions, 2, 4, hidden), (3,))
    bias[:, 0, :, hidden:] = SATURATED  # of the gates input, output, forget, cell
    bias[:, 0, 3, -1] = -SATURATED
    _set_weight(graph, node, 3, bias.reshape(directions, -1))
    for index, state in enumerate(node.inputs[5:7], start=5):
        is_cell = index > 5  # noqa: PLR2004 - initial_h, then initial_c
        if state is not None:
            bound = SATURATED if is_cell else 1.0
            node.replace_input_with(index, _bounded(graph, node, state, bound, clip=not is_cell))
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", hidden + SENTINELS)
    for output in node.outputs:
        _narrow(graph, node, output, hidden)


def _widen_product(graph: ir.Graph, node: ir.Node) -> None:
    """Zeros among the weights for the two columns."""
    product = find_product(node)
    assert product is not None
    wide = _pad(product.matrix(), (0,))
    _set_weight(graph, node, 1, wide.T if node.attributes.get_int("transB", 0) else wide)


def _bounded(graph: ir.Graph, node: ir.Node, value: ir.Value, bound: float, *, clip: bool = True) -> ir.Value:
    """The value between -bound and bound, with two more columns, one of each."""
    assert value.shape is not None
    name, rank = value.name, len(value.shape)
    low, high = (add_constant(graph, f"{name}.bound{n}", np.float32(n)) for n in (-bound, bound))
    one_behind = add_constant(graph, f"{name}.pads", np.eye(2 * rank, dtype=np.int64)[-1])
    steps = [("Clip", low, high)] if clip else []
    for operator, *inputs in [*steps, ("Pad", one_behind, high), ("Pad", one_behind, low)]:
        output = ir.val(f"{value.name}.{operator.lower()}", dtype=ir.DataType.FLOAT)
        output.shape = ir.Shape([None] * rank)
        graph.insert_before(node, ir.node(operator, [value, *inputs], outputs=[output]))
        value = output
    return value


def _narrow(graph: ir.Graph, node: ir.Node, output: ir.Value, hidden: int) -> None:
    """Leave the two units out of what others read; a Slice takes over the output's name and users."""
    users, is_output = tuple(output.uses()), output.is_graph_output()
    if not users and not is_output:
        return
    narrow = ir.val(output.name, dtype=ir.DataType.FLOAT, shape=output.shape)
    output.name, output.shape = f"{output.name}.wide", None
    cut = [
        add_constant(graph, f"{output.name}.{name}", np.array([number]))
        for name, number in (("start", 0), ("end", hidden), ("axis", -1))
    ]
    graph.insert_after(node, ir.node("Slice", [output, *cut], outputs=[narrow]))
    for user, index in users:
        user.replace_input_with(index, narrow)
    if is_output:
        graph.outputs[graph.outputs.index(output)] = narrow


def _pad(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Zeros behind, along some axes."""
    return np.pad(array, [(0, SENTINELS if axis in axes else 0) for axis in range(array.ndim)])


def _set_weight(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    name = f"{node.outputs[0].name or node.outputs[1].name}.wide{'XWRB'[index]}"
    node.replace_input_with(index, add_constant(graph, name, array))
