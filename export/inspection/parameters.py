"""The numbers that a graph stores: how many, in what types, how many of them quantized."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from export.inspection.graph_file import graphs, nodes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Uses = Mapping[str, list[tuple[onnx.NodeProto, int]]]

FEW_BITS = 8
# Inputs that hold scales or zero points: they belong to the quantization, and are no parameters.
_FOUR, _BINARY = frozenset({1, 2, 3, 4}), frozenset({1, 2, 4, 5, 6, 7})
QUANTIZATION_INPUTS: Mapping[str, frozenset[int]] = {
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),
    "ConvInteger": frozenset({2, 3}),
    "MatMulInteger": frozenset({2, 3}),
    "MatMulIntegerToFloat": frozenset({2, 3, 4, 5}),
    "DynamicQuantizeMatMul": frozenset({2, 3}),
    "DynamicQuantizeLSTM": frozenset({8, 9, 10, 11}),
    "MatMulNBits": frozenset({2, 3}),
    "GatherBlockQuantized": frozenset({2, 3}),
    "QAttention": frozenset({3, 4, 6, 7}),
    "QGemm": frozenset({1, 2, 4, 5, 7, 8}),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"), _BINARY),
    **dict.fromkeys(("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"), _FOUR),
    **dict.fromkeys(("QLinearGlobalAveragePool", "QLinearAveragePool"), _FOUR),
}
# Inputs where 32-bit integers are a quantized bias, and not an index.
BIAS_INPUTS: Mapping[str, int] = {"DequantizeLinear": 0, "QLinearConv": 8, "QGemm": 6}
# Operators whose input of this number packs several numbers into a byte.
PACKED_INPUTS: Mapping[str, int] = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
REARRANGING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

_TYPES = {value: name for name, value in TensorProto.DataType.items()}
_FLOATS = {name for name in _TYPES.values() if "FLOAT" in name} | {"DOUBLE"}


@dataclass(frozen=True)
class Parameters:
    """What the graph stores.

    Attributes:
        count: floating-point numbers, and integers that stand for some; neither scales and zero points, nor
            indices and shapes.
        quantized: those of them stored in 8 bits or less.
        count_by_bits: bits per number, as text, to how many there are.
        bytes_by_type: ONNX type to bytes, of everything that is stored, scales and indices too.
    """

    count: int
    quantized: int
    count_by_bits: Mapping[str, int]
    bytes_by_type: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of everything that is stored."""
        return sum(self.bytes_by_type.values())


def count_parameters(model: onnx.ModelProto) -> Parameters:
    """Count initializers and constants, those of inner graphs too; external data needn't be there."""
    uses = _uses(model.graph)
    by_bits: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    for name, tensor in constants(model.graph):
        sizes[type_name(tensor.data_type)] += tensor_bytes(tensor)
        count, bits = _parameters(tensor, uses.get(name, []))
        by_bits[bits] += count
    return Parameters(
        count=by_bits.total(),
        quantized=sum(count for bits, count in by_bits.items() if bits <= FEW_BITS),
        count_by_bits={str(bits): count for bits, count in sorted(by_bits.items()) if count},
        bytes_by_type=dict(sorted(sizes.items(), key=lambda item: -item[1])),
    )


def constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Name and tensor of everything stored: initializers, sparse ones (their two tensors), Constant nodes."""
    for inner in graphs(graph):
        yield from ((tensor.name, tensor) for tensor in inner.initializer)
        for sparse in inner.sparse_initializer:
            yield sparse.values.name, sparse.values
            yield "", sparse.indices
        for node in inner.node:
            if node.op_type == "Constant":
                yield from ((node.output[0], a.t) for a in node.attribute if a.HasField("t"))


def type_name(data_type: int) -> str:
    """ONNX's name of an element type."""
    return _TYPES.get(data_type, f"type {data_type}")


def bits_of(name: str) -> int:
    """Bits per number of an ONNX type; 0 for strings and types that this onnx doesn't know."""
    if name in {"INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1"}:
        return 2 if name.endswith("2") else 4
    value = dict(TensorProto.DataType.items()).get(name, TensorProto.UNDEFINED)
    if value in {TensorProto.UNDEFINED, TensorProto.STRING}:
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(value).itemsize) * 8


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's content."""
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return -(-math.prod(tensor.dims) * bits_of(type_name(tensor.data_type)) // 8)


def _uses(graph: onnx.GraphProto) -> Uses:
    """Name to the nodes that read it and the number of their input; rearranged numbers go by their source."""
    found: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    source: dict[str, str] = {}
    for node in nodes(graph):
        if node.op_type in REARRANGING and node.input:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
            continue
        for index, name in enumerate(node.input):
            found[source.get(name, name)].append((node, index))
    return found


def _parameters(tensor: onnx.TensorProto, uses: list[tuple[onnx.NodeProto, int]]) -> tuple[int, int]:
    """How many parameters a tensor holds, and in how many bits each."""
    kind = type_name(tensor.data_type)
    bits, count = bits_of(kind), math.prod(tensor.dims)
    if uses and all(index in QUANTIZATION_INPUTS.get(node.op_type, ()) for node, index in uses):
        return 0, bits
    if kind in _FLOATS:
        return count, bits
    for node, index in uses:
        if kind == "UINT8" and PACKED_INPUTS.get(node.op_type) == index:
            return _packed(node, count)
        if kind == "INT32" and BIAS_INPUTS.get(node.op_type) == index:
            return count, bits
    is_small = kind != "BOOL" and 0 < bits <= 2 * FEW_BITS
    return (count if is_small else 0), bits


def _packed(node: onnx.NodeProto, count: int) -> tuple[int, int]:
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    bits = settings.get("bits", 4)
    if node.op_type == "MatMulNBits":  # its last block is filled up
        return settings["N"] * settings["K"], bits
    return count * 8 // bits, bits
