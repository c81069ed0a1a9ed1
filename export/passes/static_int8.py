"""Static quantization to 8 bits, for networks of convolutions and matrix products.

Quantized values stand between QuantizeLinear and DequantizeLinear nodes (ONNX operators of opset 19), which
onnxruntime fuses with what is between them into integer operators at load. All ranges are fixed here, from
calibration rows, so that an answer doesn't depend on the rest of its batch.
"""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tqdm import tqdm

from export.errors import ExportError
from export.passes import PassResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

Target = Literal["x86", "arm64"]

ACTIVATIONS = {
    # On x86 the instructions multiply unsigned by signed bytes: signed activations take 2 to 3 times as long.
    "x86": QuantType.QUInt8,
    # On ARM both operands of the dot product are signed. Zero points stay free all the same: symmetric ranges
    # would keep ReLU6 as 35 float nodes in MobileNetV2, and leave it 7 of the 8 bits.
    "arm64": QuantType.QInt8,
}
MACHINES: Mapping[str, Target] = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm64", "arm64": "arm64"}
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
OPERATORS = ("Conv", "Gemm", "MatMul")
# A range is the mean of the batches' smallest and largest values, so that no outlier stretches it. Of 10 000
# Fashion-MNIST images three MobileNetV2 in int8 answered 1.1, 0.8 and 1.5 % otherwise than in fp32; with the
# extremes of all rows it was 1.1, 1.2 and 2.4 %, with the 99.999th percentile, for three times the time, 1.0,
# 0.9 and 1.5 %.
CALIBRATION_BATCH = 32


def this_target() -> Target:
    """The target that this machine is.

    Raises:
        ExportError: it is neither.
    """
    machine = platform.machine()
    if target := MACHINES.get(machine.lower()):
        return target
    raise ExportError(
        f"processor {machine!r} is no known target; name one with --target {'|'.join(get_args(Target))}"
    )


@dataclass(frozen=True)
class StaticInt8:
    """INT8 weights with a scale per output channel, 8-bit activations with one scale and zero point each.

    Attributes:
        calibration: input name to rows [n, ...] as a client sends them.
        target: decides the activations' type, UINT8 for "x86" and INT8 for "arm64".
    """

    name: ClassVar[str] = "static_int8"

    calibration: Mapping[str, np.ndarray]
    target: Target

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        operators = {node.op_type for node in model.graph}
        if "DequantizeLinear" in operators:
            return "the graph is quantized already"
        if "LSTM" in operators:
            return "an LSTM has no static integer kernel; quantize it dynamically"
        if not operators.intersection(OPERATORS):
            return f"the graph has none of {', '.join(OPERATORS)}"
        if missing := {value.name for value in model.graph.inputs} - set(self.calibration):
            return f"no calibration rows for input {', '.join(map(repr, sorted(map(str, missing))))}"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        with tempfile.TemporaryDirectory() as folder:
            prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
            # Folds batch norms and infers shapes: the quantizer needs both to see what a convolution ends in.
            quant_pre_process(ir.to_proto(model), prepared)
            quantize_static(
                prepared,
                quantized,
                CalibrationRows(self.calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=ACTIVATIONS[self.target],
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_input_arithmetic(model.graph),
                extra_options={"CalibMovingAverage": True},
            )
            result = ir.from_proto(onnx.load(quantized))
        return PassResult(result, {"quantized weights": _quantized_weights(result)})


class CalibrationRows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """Feeds the quantizer, with a progress bar on a terminal."""

    def __init__(self, rows: Mapping[str, np.ndarray]) -> None:
        self._batches = _batches(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None after the last."""
        return next(self._batches, None)


def _batches(rows: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    count = len(next(iter(rows.values())))
    with tqdm(total=count, desc="calibrate", unit="row", disable=None, leave=False) as progress:
        for start in range(0, count, CALIBRATION_BATCH):
            batch = {name: array[start : start + CALIBRATION_BATCH] for name, array in rows.items()}
            yield batch
            progress.update(len(next(iter(batch.values()))))


def _input_arithmetic(graph: ir.Graph) -> list[str]:
    """Names of the arithmetic nodes before all weights: their result is rounded once, not at each step."""
    weighted: set[ir.Node] = set()
    names: list[str] = []
    for node in graph:  # in topological order
        if node.op_type in OPERATORS or not weighted.isdisjoint(node.predecessors()):
            weighted.add(node)
        elif node.op_type in ARITHMETIC and node.name:
            names.append(node.name)
    return names


def _quantized_weights(model: ir.Model) -> int:
    return sum(
        node.op_type in OPERATORS
        and (weight := node.inputs[1]) is not None
        and (producer := weight.producer()) is not None
        and producer.op_type == "DequantizeLinear"
        for node in model.graph
    )
