"""Static quantization to 8 bits, for networks of convolutions and matrix products.

Quantized values stand between QuantizeLinear and DequantizeLinear nodes (ONNX operators of opset 19), which
runtimes fuse with what is between them into integer operators at load. All ranges are fixed here, from
calibration rows, so that an answer doesn't depend on the rest of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from export.int8.quantizable import (
    BETWEEN_CONVOLUTIONS,
    PRODUCTS,
    TABLE,
    is_product,
    is_table,
    quantizable_nodes,
    rounded_values,
    weighted_nodes,
)
from export.passes import PassResult

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx

    from export.int8.calibration import Ranges
    from export.targets import Target

__all__ = ["SCHEMES", "Scheme", "StaticInt8", "quantize_nodes"]

OLDEST_OPSET = 13
"""The first whose DequantizeLinear takes a scale per channel."""


@dataclass(frozen=True)
class Scheme:
    """How activations and weights are rounded; weights are INT8, a scale per output channel, zero point 0.

    Attributes:
        activations: their type; one scale and one zero point each.
        symmetric: whether all zero points are 0, at the price of half the levels after a ReLU.
        reduce_range: whether weights take 7 of the 8 bits.
        float_bias: whether biases stay FP32; else they are INT32, which onnxruntime's CPU kernels want.
    """

    activations: Literal["uint8", "int8"]
    symmetric: bool
    reduce_range: bool
    float_bias: bool = False


SCHEMES: Mapping[Target, Scheme] = {
    # The instructions multiply unsigned by signed bytes: signed activations take 2 to 3 times as long.
    "x86-vnni": Scheme("uint8", symmetric=False, reduce_range=False),
    # Without VNNI the same product goes through vpmaddubsw, which adds two products in 16 bits and saturates:
    # 2 * 255 * 127 is over 32 767, 2 * 255 * 64 is not.
    "x86": Scheme("uint8", symmetric=False, reduce_range=True),
    # On ARM both operands of the dot product are signed. Zero points stay free all the same: symmetric ranges
    # would keep ReLU6 as 35 float nodes in MobileNetV2, and leave it 7 of the 8 bits.
    "arm64": Scheme("int8", symmetric=False, reduce_range=False),
    # TensorRT takes zero points of 0 alone, and no quantized biases.
    "cuda": Scheme("int8", symmetric=True, reduce_range=False, float_bias=True),
    # OpenVINO runs symmetric ranges on each of its devices; others cost it a correction, or the CPU's float.
    "openvino": Scheme("int8", symmetric=True, reduce_range=False, float_bias=True),
}
ACTIVATIONS = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


@dataclass(frozen=True)
class StaticInt8:
    """INT8 weights and 8-bit activations between them.

    Attributes:
        ranges: what `calibrate` found for this very graph.
        scheme: how to round.
        exclude: names of nodes that stay float.
    """

    name: ClassVar[str] = "static_int8"

    ranges: Ranges
    scheme: Scheme
    exclude: frozenset[str] = frozenset()

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        operators = {node.op_type for node in model.graph}
        if "DequantizeLinear" in operators:
            return "the graph is quantized already"
        if "LSTM" in operators:
            return "an LSTM has no static integer kernel; quantize it dynamically"
        if (opset := model.opset_imports.get("", 0)) < OLDEST_OPSET:
            return f"a scale per channel needs opset {OLDEST_OPSET}, the graph has {opset}"
        if not any(is_product(node) for node in model.graph):
            return f"the graph has none of {', '.join(PRODUCTS)} with constant weights"
        if not {str(node.name) for node in weighted_nodes(model.graph)} - self.exclude:
            return "each layer with weights is excluded"
        values = {str(value.name) for value in rounded_values(model.graph)}
        if missing := sorted(values - set(self.ranges.bounds)):
            return f"no range for value {missing[0]!r}: calibrate the prepared graph that is to be quantized"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        nodes = {str(node.name) for node in quantizable_nodes(model.graph)} - self.exclude
        result = quantize_nodes(model, nodes, self.ranges, self.scheme)
        weighted = {str(node.name) for node in weighted_nodes(model.graph)}
        changes = {"quantized weights": len(weighted & nodes), "weights left float": len(weighted - nodes)}
        return PassResult(result, changes)


def quantize_nodes(model: ir.Model, nodes: Collection[str], ranges: Ranges, scheme: Scheme) -> ir.Model:
    """A copy in which these nodes, by name, are between QuantizeLinear and DequantizeLinear.

    Args:
        model: prepared; stays as it is.
        nodes: some of `export.int8.quantizable.quantizable_nodes`.
        ranges: of every value that those take and give.
        scheme: how to round.
    """
    if not nodes:
        return model.clone()
    proto = ir.to_proto(model)
    mark = proto.metadata_props.add()  # says that shapes are inferred; else they are again, through a file
    mark.key, mark.value = "onnx.infer", "onnxruntime.quant"
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=scheme.reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=ACTIVATIONS[scheme.activations],
        tensors_range=_tensors_data(ranges),
        nodes_to_quantize=sorted(nodes),
        nodes_to_exclude=[],
        op_types_to_quantize=[*PRODUCTS, TABLE, *BETWEEN_CONVOLUTIONS],
        extra_options={
            "ActivationSymmetric": scheme.symmetric,
            "QuantizeBias": not scheme.float_bias,
            # The integer product gives its float sums at once: what follows in a transformer is float.
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            "TensorQuantOverrides": _tables(model.graph, nodes),
        },
    )
    quantizer.quantize_model()
    result = ir.from_proto(_without_mark(quantizer.model.model))
    common.TopologicalSortPass()(result)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    return result


def _tensors_data(ranges: Ranges) -> Any:
    """The ranges as onnxruntime's quantizer takes them."""
    bounds = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.bounds.items()
    }
    return TensorsData(CalibrationMethod.MinMax, bounds)


def _tables(graph: ir.Graph, nodes: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """Tables are INT8 with one scale: only those are read row by row, else all is made float at each run."""
    return {
        str(node.inputs[0].name): [{"quant_type": QuantType.QInt8, "symmetric": True}]
        for node in graph
        if node.name in nodes and is_table(node) and node.inputs[0] is not None
    }


def _without_mark(proto: onnx.ModelProto) -> onnx.ModelProto:
    kept = [entry for entry in proto.metadata_props if entry.key != "onnx.infer"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    return proto
