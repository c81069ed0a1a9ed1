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
        changes["tables read in integers"] = sum(_take_rows_first(graph, node) for node in tuple(graph))
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
    if exact is None or exact.is_graph_input() or exact.is_graph_output():
        return False
    name, output.name = output.name, f"{output.name}.rounded"
    exact.name, exact.shape, exact.type = name, output.shape, output.type
    graph.outputs[graph.outputs.index(output)] = exact
    if output.uses():  # the layers behind it stay integer
        return True
    graph.remove(dequantize, safe=True)
    # Left in place, though nothing reads it, it would keep onnxruntime from fusing the integer product.
    if not quantize.outputs[0].uses():
        graph.remove(quantize, safe=True)
    return True


def _take_rows_first(graph: ir.Graph, gather: ir.Node) -> bool:
    """Make float only the rows that a Gather takes, and don't round them again: they are rounded already."""
    table = gather.inputs[0]
    dequantize = table.producer() if table is not None else None
    if gather.op_type != "Gather" or dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    integers, *scale = dequantize.inputs
    if (
        integers is None
        or integers.const_value is None
        or any(len(part.shape or ()) for part in scale if part)
    ):
        return False
    rows = ir.node("Gather", [integers, gather.inputs[1]], {**gather.attributes})
    made_float = ir.node("DequantizeLinear", [rows.outputs[0], *scale])
    graph.insert_before(gather, [rows, made_float])
    old, new = gather.outputs[0], made_float.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    rows.outputs[0].name = f"{old.name}.integers"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(gather, safe=True)
    for again in new.consumers():
        if again.op_type == "QuantizeLinear":
            for back in tuple(again.outputs[0].consumers()):
                back.outputs[0].replace_all_uses_with(new)
    return True


def _omit_bias_zero_point(node: ir.Node) -> bool:
    """Biases are INT32, for which DequantizeLinear-19 has no zero point; the quantizer writes zeros."""
    quantized = node.inputs[0]
    if node.op_type != "DequantizeLinear" or quantized is None or quantized.dtype != ir.DataType.INT32:
        return False
    node.resize_inputs(2)
    return True
