"""Dynamic quantization to 8 bits, for LSTMs and matrix products: activation ranges are found at every run.

An LSTM becomes onnxruntime's DynamicQuantizeLSTM; a product goes through DynamicQuantizeLinear and
MatMulInteger, which onnxruntime fuses at load. Never convolutions: ten times slower than in float.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeLSTM
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import PassResult
from export.passes.weights import Product, add_constant, array_of, find_product, is_constant

QUANTIZED = (
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulNBits",
)
WITHOUT_KERNEL = ("GRU", "RNN")
MICROSOFT = "com.microsoft"
LSTM_INPUTS = 8  # X, W, R, B, sequence_lens, initial_h, initial_c, P; then the scales and zero points


@dataclass(frozen=True)
class DynamicInt8:
    """INT8 weights, UINT8 activations with one range per tensor and run.

    A range is taken over all rows of a batch, so a row's answer depends on the others: see
    `export.passes.bound_ranges` for the way out.

    A product's weights have a scale per output, which costs nothing. An LSTM's have one per direction: with
    one per gate and unit, LSTM(128) was 1.80 instead of 2.15 times as fast as in float, and the mse of a
    forecaster of ETTh1 had grown by 0.00 instead of 0.11 %.

    Attributes:
        reduce_range: weights of 7 bits, for x86 without VNNI, which adds pairs of products in 16 bits.
    """

    name: ClassVar[str] = "dynamic_int8"

    reduce_range: bool = False

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        operators = {node.op_type for node in model.graph}
        if operators.intersection(QUANTIZED):
            return "the graph is quantized already"
        if without := sorted(operators.intersection(WITHOUT_KERNEL)):
            return f"a {' and '.join(without)} has no integer kernel; only an LSTM has one"
        if not any(is_quantizable(node) for node in model.graph):
            return "the graph has no LSTM, MatMul or Gemm with constant weights"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        rewrite = _Rewrite(model.graph, 63 if self.reduce_range else 127)
        nodes = [node for node in model.graph if is_quantizable(node)]
        for node in nodes:
            if node.op_type == "LSTM":
                rewrite.lstm(node)
            else:
                rewrite.product(node)
        model.graph.opset_imports[MICROSOFT] = 1
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        changes = Counter(f"{node.op_type} to int8" for node in nodes)
        return PassResult(model, dict(changes))


class _Rewrite:
    """Replaces nodes of one graph."""

    def __init__(self, graph: ir.Graph, largest: int) -> None:
        self.graph = graph
        self.largest = largest
        self.activations: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.weights: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}

    def lstm(self, node: ir.Node) -> None:
        """Put a DynamicQuantizeLSTM in an LSTM's place: weights transposed, scales and zero points behind."""
        inputs = [*node.inputs, *[None] * (LSTM_INPUTS - len(node.inputs))]
        for index in (1, 2):
            quantized, scale = self.quantize(array_of(node.inputs[index]).transpose(0, 2, 1), (1, 2))
            name = f"{node.outputs[0].name or node.outputs[1].name}.{'XWR'[index]}"
            inputs[index] = add_constant(self.graph, name, quantized)
            inputs += [
                add_constant(self.graph, f"{name}.scale", scale.reshape(-1)),
                add_constant(self.graph, f"{name}.zero_point", np.zeros(len(scale), np.int8)),
            ]
        outputs = [ir.val(value.name, shape=value.shape, type=value.type) for value in node.outputs]
        attributes = [value for name, value in node.attributes.items() if name != "layout"]
        new = ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, attributes, outputs=outputs)
        self.replace(node, [new])

    def product(self, node: ir.Node) -> None:
        """Put an integer product with float result in the place of a MatMul or Gemm."""
        product = find_product(node)
        assert product is not None
        new, quantized, scale, zero_point = self.activation(product.rows)
        weight, weight_scale = self.weight(product)
        name = str(node.outputs[0].name)

        def add(operator: str, inputs: list[ir.Value], kind: ir.DataType, **attributes: int) -> ir.Value:
            output = ir.val(f"{name}.{operator}{len(new)}", dtype=kind)
            new.append(ir.node(operator, inputs, attributes=attributes, outputs=[output]))
            return output

        summed = ir.val(f"{name}.integer", dtype=ir.DataType.INT32)
        new.append(ir.node("MatMulInteger", [quantized, weight, zero_point], outputs=[summed]))
        result = add("Cast", [summed], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        result = add("Mul", [result, add("Mul", [scale, weight_scale], ir.DataType.FLOAT)], ir.DataType.FLOAT)
        if product.bias is not None:
            result = add("Add", [result, product.bias], ir.DataType.FLOAT)
        result.name, result.shape = name, node.outputs[0].shape
        self.replace(node, new)

    def activation(self, value: ir.Value) -> tuple[list[ir.Node], ir.Value, ir.Value, ir.Value]:
        """New nodes, and what they make of a float tensor: its UINT8 form, scale and zero point."""
        new: list[ir.Node] = []
        if value not in self.activations:
            parts = (("UINT8", "quantized"), ("FLOAT", "scale"), ("UINT8", "zero_point"))
            outputs = [ir.val(f"{value.name}.{part}", dtype=ir.DataType[kind]) for kind, part in parts]
            new.append(ir.node("DynamicQuantizeLinear", [value], outputs=outputs))
            quantized, scale, zero_point = outputs
            self.activations[value] = (quantized, scale, zero_point)
        return (new, *self.activations[value])

    def weight(self, product: Product) -> tuple[ir.Value, ir.Value]:
        """INT8 [in, out] and its scales [out]; once for each that several products share."""
        key = (product.weight, product.transposed)
        if key not in self.weights:
            quantized, scale = self.quantize(product.matrix(), (0,))
            name, suffix = product.weight.name, ".T" if product.transposed else ""
            self.weights[key] = (
                add_constant(self.graph, f"{name}.int8{suffix}", quantized),
                add_constant(self.graph, f"{name}.scale{suffix}", scale.reshape(-1)),
            )
        return self.weights[key]

    def quantize(self, array: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """INT8 numbers, symmetric around 0, and FP32 scales that the numbers along `axes` share."""
        scale = np.abs(array).max(axis=axes, keepdims=True) / self.largest
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        return np.ascontiguousarray(np.round(array / scale).astype(np.int8)), scale

    def replace(self, node: ir.Node, new: list[ir.Node]) -> None:
        """Put nodes in a node's place; the last one's outputs take over from its."""
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], new, node.outputs, new[-1].outputs)


def is_quantizable(node: ir.Node) -> bool:
    """Whether it is an LSTM or a product with constant FP32 weights."""
    if node.op_type == "LSTM" and node.domain == "":
        return not node.attributes.get_int("layout", 0) and all(map(is_constant, node.inputs[1:3]))
    return find_product(node) is not None
