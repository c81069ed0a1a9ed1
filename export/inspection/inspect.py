"""What an ONNX graph is, costs and holds.

python -m export inspect models/mobilenet --shape time=128
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx.inliner

from export.errors import ExportError
from export.inspection.activations import peak_activations
from export.inspection.description import describe
from export.inspection.flops import Work, count_work
from export.inspection.graph_file import graph_path, nodes, read_graph
from export.inspection.parameters import Parameters, constants, count_parameters
from export.inspection.signature import (
    Tensor,
    add_shape_flag,
    axis_sizes,
    describe_value,
    given_sizes,
    graph_inputs,
    input_values,
    symbols,
)
from export.inspection.trace import Trace, trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Inspection:
    """What there is to say about a graph.

    Attributes:
        path: its file.
        inputs: without those that have a value stored.
        outputs: all.
        opsets: operator domain to version.
        ir_version: of the file format.
        producer: what wrote it, with its version.
        file_bytes: with the files of external data.
        parameters: what it stores.
        operators: operator type, with its domain where it is not ONNX's, to how many nodes.
        sizes: symbolic axis to the size that the figures below are for.
        work: what one run is.
        peak_activation_bytes: most bytes of values alive at one time, inputs and outputs too; an estimate, as
            runtimes place them.
        notes: what the figures leave out or assume.
    """

    path: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    opsets: Mapping[str, int]
    ir_version: int
    producer: str
    file_bytes: int
    parameters: Parameters
    operators: Mapping[str, int]
    sizes: Mapping[str, int]
    work: Work
    peak_activation_bytes: int
    notes: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """Weights and the peak of the activations: what a runtime that wastes nothing would need."""
        return self.parameters.bytes + self.peak_activation_bytes

    @property
    def quantized_parameters(self) -> float:
        """Share of the parameters in 8 bits or less."""
        return self.parameters.quantized / max(self.parameters.count, 1)

    @property
    def quantized_work(self) -> float:
        """Share of the multiply-adds in integer operators."""
        return self.work.integer_multiply_adds / max(self.work.multiply_adds, 1)

    def as_json(self) -> dict[str, Any]:
        """All figures, the derived ones too, as JSON values."""
        derived = ("memory_bytes", "quantized_parameters", "quantized_work")
        content = asdict(self) | {name: getattr(self, name) for name in derived}
        content["work"]["flops"] = self.work.flops
        content["parameters"]["bytes"] = self.parameters.bytes
        return content


def inspect_graph(path: Path, sizes: Mapping[str, int] | None = None) -> Inspection:
    """Read a graph and run it once for its shapes.

    Args:
        path: file, version folder or entry folder.
        sizes: symbolic axis, or INPUT.AXIS for an unnamed one, to its size; 1 for all others.

    Raises:
        ExportError: there is no graph, it is damaged, or a size is for an axis that it hasn't.
        OSError: a file can't be read.
    """
    file = graph_path(path)
    model = read_graph(file)
    inputs = graph_inputs(model)
    parameters = count_parameters(model)
    chosen = axis_sizes(inputs, sizes or {})
    inlined = _inline(model)
    operators = Counter(_operator(node) for node in nodes(inlined.graph))
    seen = trace(inlined, file.parent, input_values(inputs, chosen))
    return Inspection(
        path=str(file),
        inputs=inputs,
        outputs=tuple(map(describe_value, model.graph.output)),
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        file_bytes=_file_bytes(file, model),
        parameters=parameters,
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        sizes=chosen,
        work=count_work(inlined.graph, seen),
        peak_activation_bytes=peak_activations(inlined.graph, seen),
        notes=_notes(inputs, sizes or {}, seen, inlined),
    )


def _inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which local functions are replaced by their nodes, as onnxruntime does."""
    if not model.functions:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    try:
        inlined: onnx.ModelProto = onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise ExportError(f"the graph's functions can't be inlined: {error}") from error
    return inlined


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"


def _file_bytes(file: Path, model: onnx.ModelProto) -> int:
    locations = {
        entry.value
        for _, tensor in constants(model.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in sorted(locations):
        if not (file.parent / location).is_file():
            raise ExportError(f"{file}: its external data {location!r} is missing")
    return sum(path.stat().st_size for path in (file, *(file.parent / name for name in locations)))


def _notes(
    inputs: Sequence[Tensor], given: Mapping[str, int], seen: Trace, model: onnx.ModelProto
) -> tuple[str, ...]:
    notes = []
    batch = {axes[0] for tensor in inputs if 0 in (axes := symbols(tensor))}
    names = dict.fromkeys(name for tensor in inputs for name in symbols(tensor).values())
    if assumed := [name for name in names if name not in given and name not in batch]:
        notes.append(f"assumed size 1 for {', '.join(assumed)}; set others with --shape {assumed[0]}=N,...")
    if seen.reason:
        notes.append(f"shapes were inferred, not measured ({seen.reason})")
    if any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        notes.append("the memory leaves out the activations inside If, Loop and Scan")
    return tuple(notes)


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 1 when a graph could not be inspected; the others are all the same.
    """
    options = _parser().parse_args(arguments)
    sizes = given_sizes(options)
    found, failed = [], False
    for path in options.paths:
        try:
            found.append(inspect_graph(path, sizes))
        except (ExportError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    if options.json:
        print(json.dumps([inspection.as_json() for inspection in found], indent=2))
    elif found:
        print("\n\n".join(map(describe, found)))
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export inspect",
        description="Say what ONNX graphs are, cost and hold.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="GRAPH", help=".onnx file, version folder or entry folder"
    )
    add_shape_flag(parser, "sizes of symbolic axes (default: 1 each); an axis without a name is INPUT.NUMBER")
    parser.add_argument("--json", action="store_true", help="print a JSON list, with everything in it")
    return parser
