"""Half precision: FP16 weights and arithmetic, for GPUs and for half the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.passes import PassResult

LARGEST = 65504.0
"""Of FP16's finite numbers."""

# Exporters write such numbers for infinity: as a mask's bias, or as a bound that never binds. FP16's largest
# number does the same.
INFINITE = 1e9

QUANTIZED = frozenset(
    (
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "QuantizeLinear",
    )
)

CONTROL_FLOW = frozenset(("If", "Loop", "Scan"))


@dataclass(frozen=True)
class Float16:
    """Store weights and compute in FP16.

    Where a provider has no FP16 kernel for an operator, as the CPU's for most, onnxruntime casts around it:
    the answers are the same and take longer.

    Attributes:
        keep_io: whether inputs and outputs stay FP32, so that clients need not know.
    """

    name: ClassVar[str] = "float16"

    keep_io: bool = True

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        operators = {node.op_type for node in model.graph.all_nodes()}
        if quantized := operators & QUANTIZED:
            return f"the graph is quantized already: it has {', '.join(sorted(quantized))}"
        if control := operators & CONTROL_FLOW:
            # The library doesn't follow what their bodies read from outside.
            return f"the graph has {', '.join(sorted(control))}: apply it before the pass that adds that"
        sizes = {name: _largest(constant) for name, constant in _constants(model.graph).items()}
        if too_large := {name: size for name, size in sizes.items() if LARGEST < size < INFINITE}:
            found = ", ".join(f"{name!r} up to {size:.3g}" for name, size in too_large.items())
            return f"FP16 ends at {LARGEST:.0f}, the graph has larger constants: {found}"
        if not _constants(model.graph):
            return "the graph has no FP32 constants"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        constants = len(_constants(model.graph))
        result = ir.from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=self.keep_io))
        common.TopologicalSortPass()(result)  # the library puts all its casts last
        return PassResult(result, {"FP16 constants": constants - len(_constants(result.graph))})


def _constants(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """FP32 initializers and Constant nodes, by name."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            tensors[str(node.outputs[0].name)] = node.attributes["value"].as_tensor()
    return {name: t for name, t in tensors.items() if t is not None and t.dtype == ir.DataType.FLOAT}


def _largest(constant: ir.TensorProtocol) -> float:
    """The largest magnitude, infinities aside; 0 where there is none."""
    sizes = np.abs(constant.numpy())
    return float(sizes[np.isfinite(sizes)].max(initial=0))
