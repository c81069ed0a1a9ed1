"""The passes that lead to the fp32 and the int8 graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from export.errors import ExportError
from export.graph import check_graph, serialize
from export.passes.clean_up import CleanUp
from export.passes.flatten_normalization import FlattenNormalization
from export.passes.static_int8 import StaticInt8, Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import onnx_ir as ir

    from export.passes import Pass


Precision = Literal["fp32", "int8"]

PRECISIONS: Mapping[str, Precision] = {
    "mobilenet": "int8",
    "resnet": "int8",
    "simplecnn": "int8",
    # An LSTM has no static integer kernel, and a graph with dynamic ranges mixes the rows of a batch.
    "lstm": "fp32",
    "gpt": "fp32",
    # The quantizer's symbolic shape inference gives up on its attention mask.
    "bert": "fp32",
}
"""Family to what is served of it."""


@dataclass(frozen=True)
class Graphs:
    """What the passes made.

    Attributes:
        served: the graph of the precision that was asked for.
        content: "fp32", and "int8" where that was asked for, to the content of an `.onnx` file.
        passes: name of each pass to what it changed, or why it was not applied; JSON values.
    """

    served: ir.Model
    content: Mapping[str, bytes]
    passes: Mapping[str, Any]


def quantize(
    graph: ir.Model, calibration: Mapping[str, np.ndarray], target: Target, precision: Precision
) -> Graphs:
    """Run the passes: first the rewrites that serve both precisions, then the quantization.

    Args:
        graph: as exported; changed in place.
        calibration: input name to rows [n, ...] as a client sends them.
        target: processor that an int8 graph is for.
        precision: "fp32" leaves the quantization out.

    Raises:
        ExportError: the graph can't be quantized.
    """
    changes: dict[str, Any] = {}
    fp32 = _apply((FlattenNormalization(),), graph, changes)
    content: dict[str, bytes] = {"fp32": serialize(fp32)}
    if precision == "fp32":
        return Graphs(fp32, content, changes)
    quantization = StaticInt8(calibration, target)
    if reason := quantization.check(fp32):
        raise ExportError(f"{quantization.name} can't be applied: {reason}")
    int8 = _apply((quantization, CleanUp()), fp32, changes)
    check_graph(int8)
    content["int8"] = serialize(int8)
    return Graphs(int8, content, changes)


def _apply(passes: Sequence[Pass], model: ir.Model, changes: dict[str, Any]) -> ir.Model:
    for step in passes:
        if reason := step.check(model):
            changes[step.name] = f"not applied: {reason}"
            continue
        result = step.apply(model)
        model, changes[step.name] = result.model, dict(result.changes)
    return model
