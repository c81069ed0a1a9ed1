"""How much work a graph's operators are, counted from the shapes that they ran with.

Multiply-adds of the operators that have them, see `export.inspection.multiply_adds`, and one operation per
number of all others that compute.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.inspection.multiply_adds import (
    COUNTERS,
    MICROSOFT,
    UnknownShapeError,
    UnknownWorkError,
    number_count,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from export.inspection.trace import Execution, Trace

DEFAULT_DOMAINS = ("", "ai.onnx")
# Nothing is computed: numbers are moved, or other nodes are run.
NO_WORK = frozenset({
    "Cast", "CastLike", "Compress", "Concat", "ConcatFromSequence", "Constant", "ConstantOfShape",
    "DepthToSpace", "Expand", "EyeLike", "Flatten", "Gather", "GatherBlockQuantized", "GatherElements",
    "GatherND", "Identity", "If", "Loop", "OneHot", "Optional", "OptionalGetElement",
    "OptionalHasElement", "Pad", "Range", "Reshape", "ReverseSequence", "Scan", "ScatterElements",
    "ScatterND", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "SequenceLength", "SequenceMap", "Shape", "Size", "Slice", "SpaceToDepth", "Split",
    "SplitToSequence", "Squeeze", "TensorScatter", "Tile", "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
# Work that depends on more than the shapes, or that nobody has written down here.
NOT_COUNTED = frozenset({
    "DFT", "Det", "GridSample", "MaxRoiPool", "MelWeightMatrix", "NonMaxSuppression", "RoiAlign", "STFT",
    "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "Unique",
    "FlexAttention", "LinearAttention",
})  # fmt: skip
# Contributed operators whose work is about one operation per number.
ELEMENT_WISE_CONTRIBUTIONS = frozenset({
    "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "BifurcationDetector",
    "DequantizeLinear", "DynamicQuantizeLinear", "EmbedLayerNormalization", "FastGelu", "Gelu",
    "GroupNorm", "Inverse", "LayerNormalization", "NhwcMaxPool", "QLinearAdd", "QLinearAveragePool",
    "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul", "QLinearReduceMean",
    "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QuantizeLinear", "QuickGelu", "RotaryEmbedding",
    "SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Trilu",
})  # fmt: skip
INTEGER = frozenset({
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulInteger16",
    "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul",
})  # fmt: skip
# Between quantized values, onnxruntime's CPU provider runs these in integers.
FUSED_WITH_NEIGHBOURS = frozenset({"Conv", "Gemm", "MatMul"})
EIGHT_BITS = frozenset({"INT8", "UINT8", "INT4", "UINT4"})


@dataclass(frozen=True)
class Work:
    """What one run of a graph is.

    Attributes:
        multiply_adds: of convolutions, matrix products, recurrences and attention.
        integer_multiply_adds: those of them in integer operators. MatMulNBits counts as one; whether it
            multiplies integers is up to its accuracy level.
        other_operations: one per number, of the larger side, for all other operators that compute.
        by_operator: operator to its multiply-adds.
        not_counted: operator, with the reason, to how many nodes' work is missing in these figures.
    """

    multiply_adds: int
    integer_multiply_adds: int
    other_operations: int
    by_operator: Mapping[str, int]
    not_counted: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Two operations per multiply-add, and the others."""
        return 2 * self.multiply_adds + self.other_operations


def count_work(graph: onnx.GraphProto, trace: Trace) -> Work:
    """Add up what ran.

    Args:
        graph: the traced one; says which nodes stand between quantized values.
        trace: what ran, with which shapes.
    """
    quantized = _between_quantized(graph, trace)
    by_operator: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    integer = others = 0
    for execution in trace.executions:
        heavy, light, reason = _work(execution)
        if reason:
            missing[f"{execution.operator} ({reason})"] += 1
        if heavy:
            by_operator[execution.operator] += heavy
        others += light
        in_integers = execution.operator in INTEGER or (
            execution.node is not None and execution.node.name in quantized
        )
        integer += heavy if in_integers else 0
    missing.update(_bodies(trace))
    return Work(by_operator.total(), integer, others, dict(by_operator.most_common()), dict(missing))


def _bodies(trace: Trace) -> Counter[str]:
    """Nodes that hold graphs, where nobody saw these run."""
    held = (e.operator for e in trace.executions if e.node and any(a.HasField("g") for a in e.node.attribute))
    return Counter(f"{operator} (its body was not run)" for operator in held if trace.reason)


def _work(execution: Execution) -> tuple[int, int, str]:
    """Multiply-adds, other operations, and why there are none of them."""
    operator, domain = execution.operator, execution.node.domain if execution.node else ""
    try:
        if count := COUNTERS.get((MICROSOFT if domain == MICROSOFT else "", operator)):
            return count(execution), 0, ""
        if operator in NO_WORK:
            return 0, 0, ""
        known = domain in DEFAULT_DOMAINS or (domain == MICROSOFT and operator in ELEMENT_WISE_CONTRIBUTIONS)
        if not known or operator in NOT_COUNTED:
            return 0, 0, "its work is unknown"
        return 0, max(number_count(execution.inputs), number_count(execution.outputs)), ""
    except (UnknownShapeError, IndexError, ZeroDivisionError):
        return 0, 0, "shape unknown"
    except UnknownWorkError:
        return 0, 0, "its work is unknown"


def _between_quantized(graph: onnx.GraphProto, trace: Trace) -> set[str]:
    """Names of nodes that onnxruntime fuses with the (de)quantizations around them."""
    producers = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def from_bytes(name: str) -> bool:
        source = producers.get(name)
        stored = trace.values.get(source.input[0]) if source else None
        return bool(source and source.op_type == "DequantizeLinear" and stored and stored.type in EIGHT_BITS)

    def to_bytes(name: str) -> bool:
        after = consumers.get(name, [])
        if len(after) == 1 and after[0].op_type in {"Relu", "Clip"}:  # part of the quantized range
            return to_bytes(after[0].output[0])
        return bool(after) and all(node.op_type == "QuantizeLinear" for node in after)

    return {
        node.name
        for node in graph.node
        if node.op_type in FUSED_WITH_NEIGHBOURS and all(from_bytes(name) for name in node.input[:2])
        # A matrix product can leave the integers by itself; a convolution can't.
        if node.op_type != "Conv" or to_bytes(node.output[0])
    }
