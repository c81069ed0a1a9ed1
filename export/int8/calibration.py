"""The ranges of activations, from rows as a client sends them.

Ranges are found once per method and graph, and serve every quantization of it. Statistics are taken batch by
batch: memory doesn't grow with the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import onnx_ir as ir
from tqdm import tqdm

from export.errors import ExportError
from export.int8.quantizable import rounded_values
from export.int8.thresholds import THRESHOLDS, Histogram
from export.passes.bias_products import BiasProducts
from export.passes.flat_rows import FlatRows
from export.passes.fold_constants import FoldConstants
from export.passes.own_weights import OwnWeights
from export.passes.split_products import SplitProducts
from export.session import Session, rows, take

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Method = Literal["minmax", "entropy", "percentile"]
"""How much of an activation's distribution its range covers.

- minmax: from the mean of the batches' smallest values to that of their largest. No outlier stretches it, and
  it takes one pass. Of 10 000 Fashion-MNIST images three MobileNetV2 in int8 answered 1.1, 0.8 and 1.5 %
  otherwise than in fp32; with the extremes of all rows it was 1.1, 1.2 and 2.4 %.
- percentile: all but the outermost 0.001 %, in two passes.
- entropy: what loses the least information (see `export.int8.thresholds.entropy`), in two passes.
"""
OLDEST_OPSET, OLDEST_IR_VERSION = 17, 8
BATCH = 32
BYTES = 256 << 20
"""How much of activations a batch of the second pass may hold at once."""

Bounds = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Ranges:
    """What calibration found.

    Attributes:
        method: how.
        rows: from how many.
        bounds: value name to smallest and largest number that its rounded form should hold.
    """

    method: Method
    rows: int
    bounds: Mapping[str, tuple[float, float]]


def prepare(model: ir.Model) -> ir.Model:
    """Bring a graph into the form that is calibrated and quantized, the same each time.

    Constants and batch norms are folded, products get their bias, what stands between them works on matrices
    too, products that are cut into parts are written as several, and a matrix that is also read transposed as
    two; shapes are inferred, every node has a name.

    Args:
        model: as exported, or anyone else's; changed in place.

    Returns:
        The graph to give to `calibrate`, `StaticInt8` and `layer_errors`; it computes what it did before.

    Raises:
        ExportError: its shapes contradict each other.
    """
    model = _modernize(model)
    for step in (FoldConstants(), BiasProducts(), FlatRows(), SplitProducts(), OwnWeights()):
        model = _infer_shapes(model)
        if step.check(model) is None:
            model = step.apply(model).model
    return _infer_shapes(model)


def calibrate(prepared: ir.Model, data: Mapping[str, np.ndarray], method: Method) -> Ranges:
    """Run the rows through the graph, with a progress bar on a terminal, and choose each activation's range.

    Args:
        prepared: from `prepare`; stays as it is.
        data: input name to rows [n, ...].
        method: how to choose.

    Raises:
        ExportError: the rows are missing, none, not finite or all alike, or an activation is not finite.
    """
    check_rows(prepared, data)
    names = [str(value.name) for value in rounded_values(prepared.graph)]
    if not names:
        return Ranges(method, rows(data), {})
    proto = ir.to_proto(prepared)
    fixed = fixed_batch(prepared)
    mean, whole = extremes(proto, names, data, fixed)
    if method == "minmax":
        return Ranges(method, rows(data), mean)
    histograms = _histograms(proto, whole, data, fixed)
    bounds = {name: THRESHOLDS[method](histogram) for name, histogram in histograms.items()}
    return Ranges(method, rows(data), bounds)


def check_rows(model: ir.Model, data: Mapping[str, np.ndarray]) -> None:
    """Refuse rows that no range can be found with.

    Integers may be all alike where another input varies: an attention mask without padding is all ones.

    Raises:
        ExportError: says which input, what came and what to do.
    """
    names = [str(value.name) for value in model.graph.inputs]
    if missing := [name for name in names if name not in data]:
        raise ExportError(
            f"calibration: expected rows for each of {', '.join(names)}, got none for {', '.join(missing)}"
        )
    given = {name: np.asarray(data[name]) for name in names}
    if rows(given) == 0:
        raise ExportError("calibration: expected rows, some hundreds at best, got none")
    alike = {name: array.size > 1 and bool((array == array.flat[0]).all()) for name, array in given.items()}
    for name, array in given.items():
        is_float = np.issubdtype(array.dtype, np.floating)
        if is_float and (bad := int(array.size - np.isfinite(array).sum())):
            raise ExportError(
                f"calibration: expected finite numbers in input {name!r}, got {bad} of {array.size} that are "
                "NaN or infinite; clean the rows, or leave those out"
            )
        if alike[name] and (is_float or array.dtype == np.uint8 or all(alike.values())):
            raise ExportError(
                f"calibration: expected rows as clients send them in input {name!r}, got {array.flat[0]} in "
                f"every place of all {len(array)} rows; the ranges would fit nothing else: give real rows"
            )


def _modernize(model: ir.Model) -> ir.Model:
    """Bring older graphs to an opset with scales per channel; where onnx can't, it stays as it is."""
    ir.external_data.load_to_model(model)
    if model.opset_imports.get("", OLDEST_OPSET) >= OLDEST_OPSET:
        return model
    proto = ir.to_proto(model)
    # Up to IR version 3 every constant had to be an input too, and might be set by a client.
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.ir_version = max(proto.ir_version, OLDEST_IR_VERSION)
    try:
        return ir.from_proto(onnx.version_converter.convert_version(proto, OLDEST_OPSET))
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError):
        return model


def _infer_shapes(model: ir.Model) -> ir.Model:
    try:
        inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the graph's shapes contradict each other: {error}") from error
    return ir.from_proto(inferred)


def extremes(
    proto: onnx.ModelProto, names: list[str], data: Mapping[str, np.ndarray], fixed: int | None
) -> tuple[Bounds, Bounds]:
    """The means of the batches' smallest and largest numbers, and those of all rows.

    Args:
        proto: a graph; stays as it is.
        names: float values of it.
        data: input name to rows [n, ...].
        fixed: the size of the graph's batch, where it is constant.

    Returns:
        Value name to smallest and largest, the means and then the extremes.

    Raises:
        ExportError: a value becomes NaN or infinite.
    """
    session = Session(_with_extremes(proto, names).SerializeToString())
    progress = _progress(batches(data, fixed or BATCH, fill=fixed is not None), data, "calibrate")
    found = [session.run(batch) for batch in progress]
    low = {name: np.array([batch[f"{name}.ReduceMin"] for batch in found]) for name in names}
    high = {name: np.array([batch[f"{name}.ReduceMax"] for batch in found]) for name in names}
    for name in names:
        if not (np.isfinite(low[name]).all() and np.isfinite(high[name]).all()):
            raise ExportError(
                f"calibration: value {name!r} of the graph becomes NaN or infinite for some of the rows, in "
                "fp32 already; int8 can't hold that: look for an overflow in the network or an odd row"
            )
    mean = {name: (float(low[name].mean()), float(high[name].mean())) for name in names}
    return mean, {name: (float(low[name].min()), float(high[name].max())) for name in names}


def _with_extremes(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A graph that answers the smallest and the largest number of each value, and nothing else."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.output[:]
    for name in names:
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"{name}.{operator}"
            changed.graph.node.append(onnx.helper.make_node(operator, [name], [output], keepdims=0))
            changed.graph.output.append(
                onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [])
            )
    return changed


def _histograms(
    proto: onnx.ModelProto, whole: Bounds, data: Mapping[str, np.ndarray], fixed: int | None
) -> dict[str, Histogram]:
    """How often each value's numbers come, over all rows."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.output[:]
    changed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in whole
    )
    histograms = {name: Histogram(low, high) for name, (low, high) in whole.items()}
    session = Session(changed.SerializeToString())
    size = fixed or _affordable(session, data)
    for batch in _progress(batches(data, size, fill=fixed is not None), data, "count"):
        for name, array in session.run(batch).items():
            histograms[name].add(array)
    return histograms


def _affordable(session: Session, data: Mapping[str, np.ndarray]) -> int:
    one_row = sum(array.nbytes for array in session.run(take(data, 0, 1)).values())
    return max(1, min(BATCH, BYTES // max(1, one_row)))


def fixed_batch(model: ir.Model) -> int | None:
    """The number of rows that a graph takes at once; None where it takes any."""
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape) > 0 and isinstance(value.shape[0], int):
            return int(value.shape[0])
    return None


def batches(data: Mapping[str, np.ndarray], size: int, *, fill: bool) -> Iterator[dict[str, np.ndarray]]:
    """Rows in batches of `size`; the last one is smaller, or filled up from the first rows on."""
    count = rows(data)
    for start in range(0, count, size):
        chosen = np.arange(start, start + size)
        chosen = chosen % count if fill else chosen[chosen < count]
        yield {name: array[chosen] for name, array in data.items()}


def _progress(
    parts: Iterator[dict[str, np.ndarray]], data: Mapping[str, np.ndarray], description: str
) -> Iterator[dict[str, np.ndarray]]:
    with tqdm(total=rows(data), desc=description, unit="row", disable=None, leave=False) as progress:
        for batch in parts:
            yield batch
            progress.update(rows(batch))
