"""The shapes that a graph's values have when it runs.

Run once in onnxruntime, every node reports its real shapes: those of operators that onnx doesn't know, and
those in the bodies of loops, once for each turn. Where it can't run, onnx's shape inference has to do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from export.errors import ExportError
from export.inspection.graph_file import nodes
from export.inspection.parameters import bits_of, constants, tensor_bytes, type_name
from export.isolation import limit_memory, run_isolated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SECONDS = 60.0
LARGEST = 2 << 30
"""Bytes of weights up to which a graph is run; more might not fit beside the rest of a small machine."""


@dataclass(frozen=True)
class Value:
    """A tensor's ONNX type and shape."""

    type: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size; 0 for strings."""
        return -(-self.count * bits_of(self.type) // 8)


@dataclass(frozen=True)
class Execution:
    """One run of a node.

    Attributes:
        operator: the node's operator type.
        node: the node; None for one that onnxruntime made, from a function's body for instance.
        inputs: by position, None where there is none or its shape is unknown.
        outputs: likewise.
    """

    operator: str
    node: onnx.NodeProto | None
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]


@dataclass(frozen=True)
class Trace:
    """What ran, in order.

    Attributes:
        executions: of all nodes, those in bodies of loops as often as they ran.
        values: name to value; in the body of a loop the last one.
        reason: why the graph was not run and shapes are inferred; None when it was run.
    """

    executions: tuple[Execution, ...]
    values: Mapping[str, Value]
    reason: str | None


def trace(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, Value]) -> Trace:
    """Run the graph on ones, or else on zeros, or else infer its shapes.

    Args:
        model: without local functions; its nodes are renamed.
        folder: where its external data is.
        inputs: input name to type and shape.
    """
    named = {}
    for index, node in enumerate(nodes(model.graph)):
        node.name = f"node{index}"
        named[node.name] = node
    known = dict(inputs)
    known |= {name: Value(type_name(t.data_type), tuple(t.dims)) for name, t in constants(model.graph)}
    try:
        events = _run(model, folder, inputs)
    except ExportError as error:
        return _inferred(model, known, inputs, str(error))
    executions = [_execution(event, named, known) for event in events]
    return Trace(tuple(executions), known, None)


def _run(model: onnx.ModelProto, folder: Path, inputs: Mapping[str, Value]) -> list[Any]:
    if missing := [v.name for v in model.graph.input if v.name not in inputs and not _preset(model, v.name)]:
        raise ExportError(f"input {missing[0]!r} is no tensor of known rank")
    if (size := sum(tensor_bytes(tensor) for _, tensor in constants(model.graph))) > LARGEST:
        raise ExportError(f"{size / 1e9:.1f} GB of weights are too many to run it")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model.onnx"
        copy.write_bytes(model.SerializeToString())
        described = {name: (value.type, value.shape) for name, value in inputs.items()}
        arguments = (str(copy), str(folder.resolve()), json.dumps(described))
        events: list[Any] = json.loads(run_isolated("export.inspection.trace", arguments, SECONDS))
    return events


def _preset(model: onnx.ModelProto, name: str) -> bool:
    return any(tensor.name == name for tensor in model.graph.initializer)


def _execution(event: Any, named: Mapping[str, onnx.NodeProto], known: dict[str, Value]) -> Execution:
    name, operator, *sides = event
    inputs, outputs = ([Value(kind.upper(), tuple(shape)) for kind, shape in side] for side in sides)
    node = named.get(name)
    if node is None:
        return Execution(operator, None, tuple(inputs), tuple(outputs))
    known.update(_by_name(node.output, outputs))
    # Sequences are not reported, and neither is what was packed into the kernel: those go by their names.
    reported = known | _by_name(node.input, inputs)
    return Execution(
        operator,
        node,
        tuple(reported.get(name) if name else None for name in node.input),
        tuple(known.get(name) if name else None for name in node.output),
    )


def _by_name(names: Iterable[str], values: Sequence[Value]) -> dict[str, Value]:
    present = [name for name in names if name]
    return dict(zip(present, values, strict=True)) if len(present) == len(values) else {}


def _inferred(
    model: onnx.ModelProto, known: dict[str, Value], inputs: Mapping[str, Value], reason: str
) -> Trace:
    """Nodes of the outermost graph, each once: how often the others run, or whether, can't be told."""
    for value in model.graph.input:
        if value.name in inputs:
            shape = inputs[value.name].shape
            value.CopyFrom(
                onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape)
            )
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # noqa: BLE001 - onnx raises classes of its own, ValueError, RuntimeError, ...
        inferred, reason = model, f"{reason}; shape inference failed too: {_last_line(error)}"
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim):
            shape = tuple(axis.dim_value for axis in tensor.shape.dim)
            known.setdefault(value.name, Value(type_name(tensor.elem_type), shape))
    executions = [
        Execution(
            node.op_type,
            node,
            tuple(known.get(name) if name else None for name in node.input),
            tuple(known.get(name) if name else None for name in node.output),
        )
        for node in model.graph.node
    ]
    return Trace(tuple(executions), known, reason)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


def _profile(graph: str, folder: str, inputs: Mapping[str, Any]) -> list[Any]:
    """Name, operator, inputs and outputs of each node that ran, in order."""
    import onnxruntime  # noqa: PLC0415 - only this child process runs graphs

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = graph
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are not reported
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    failure: Exception | None = None
    for fill in (1, 0):
        try:
            session.run(None, {name: _filled(kind, shape, fill) for name, (kind, shape) in inputs.items()})
            break
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no class in common
            failure = error
            session.end_profiling()
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    else:
        assert failure is not None
        raise failure
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace"))
    return [
        (
            event["name"].removesuffix("_kernel_time"),
            event["args"]["op_name"],
            [next(iter(value.items())) for value in event["args"]["input_type_shape"]],
            [next(iter(value.items())) for value in event["args"]["output_type_shape"]],
        )
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]


def _filled(kind: str, shape: Sequence[int], fill: int) -> Any:
    import numpy as np  # noqa: PLC0415 - as above

    if kind == "STRING":
        return np.full(shape, str(fill), object)
    value = dict(onnx.TensorProto.DataType.items())[kind]
    return np.full(shape, fill, onnx.helper.tensor_dtype_to_np_dtype(value))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a child: print the profile of a graph as JSON."""
    parser = argparse.ArgumentParser(prog="python -m export.inspection.trace")
    parser.add_argument("graph")
    parser.add_argument("folder")
    parser.add_argument("inputs", type=json.loads)
    options = parser.parse_args(arguments)
    limit_memory()
    try:
        events = _profile(options.graph, options.folder, options.inputs)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent goes on without
        print(f"onnxruntime: {_last_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(events))
    return 0


if __name__ == "__main__":
    sys.exit(main())
