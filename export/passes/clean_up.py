"""What quantization leaves behind."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import PassResult

QDQ = ("QuantizeLinear", "DequantizeLinear")


class CleanUp:
    """Let outputs stay float, and drop what nothing uses.

    The quantizer rounds the graph's outputs to 8 bits and back, which costs accuracy and wins nothing: the
    last integer product can give its float result. It writes the same zeros as zero points for each weight,
    names nodes that become part of others at load, and declares every operator domain it knows.
    """

    name: ClassVar[str] = "clean_up"

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        if not any(node.op_type == "DequantizeLinear" for node in model.graph):
            return "the graph isn't quantized"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        graph = model.graph
        changes = {"outputs left float": sum(_unround(graph, output) for output in tuple(graph.outputs))}
        changes["bias zero points left out"] = sum(_omit_bias_zero_point(node) for node in graph)
        initializers = len(graph.initializers)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        common.DeduplicateInitializersPass()(model)
        changes["initializers dropped"] = initializers - len(graph.initializers)
        for node in graph:
            if node.op_type in QDQ:
                node.name = None
        return PassResult(model, changes)


def _unround(graph: ir.Graph, output: ir.Value) -> bool:
    """Give the value in front of a final QuantizeLinear and DequantizeLinear the output's place and name."""
    dequantize = output.producer()
    quantize = dequantize.inputs[0].producer() if dequantize and dequantize.inputs[0] else None
    if dequantize is None or quantize is None or (quantize.op_type, dequantize.op_type) != QDQ:
        return False
    exact = quantize.inputs[0]
    assert exact is not None
    name, output.name = output.name, f"{output.name}.rounded"
    exact.name, exact.shape, exact.type = name, output.shape, output.type
    graph.outputs[graph.outputs.index(output)] = exact
    graph.remove(dequantize, safe=True)
    # Left in place, though nothing reads it, it would keep onnxruntime from fusing the integer product.
    if not quantize.outputs[0].uses():
        graph.remove(quantize, safe=True)
    return True


def _omit_bias_zero_point(node: ir.Node) -> bool:
    """Biases are INT32, for which DequantizeLinear-19 has no zero point; the quantizer writes zeros."""
    quantized = node.inputs[0]
    if node.op_type != "DequantizeLinear" or quantized is None or quantized.dtype != ir.DataType.INT32:
        return False
    node.resize_inputs(2)
    return True
