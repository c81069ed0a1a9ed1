"""Two ONNX graphs side by side: what they hold, how fast they are, how far apart their answers are.

python -m export compare models/mobilenet/1/model.onnx models/mobilenet/1/model_int8.onnx
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.difference import OutputDifference, output_difference
from export.errors import ExportError
from export.inspection.compare_table import table
from export.inspection.graph_file import graph_path, read_graph
from export.inspection.inspect import Inspection, inspect_graph
from export.inspection.samples import Samples, candidates, fit, is_batched
from export.inspection.signature import add_shape_flag, given_sizes, graph_inputs, symbols
from export.latency import BATCHES, interleave
from export.memory import grown_bytes
from export.session import BATCH, Session, cycle
from export.targets import processor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True)
class Comparison:
    """What two graphs have apart.

    Attributes:
        inspections: of both.
        operators: operator to its counts in both, of those that differ.
        signature: what differs of inputs and outputs, a line each.
        latency_ms: batch size to both medians, one thread.
        resident_bytes: of both; None where it can't be measured.
        outputs: output name to the second graph's difference from the first.
        samples: what they were run on.
        notes: what is missing, and why.
    """

    inspections: tuple[Inspection, Inspection]
    operators: Mapping[str, tuple[int, int]]
    signature: tuple[str, ...]
    latency_ms: Mapping[str, tuple[float, float]]
    resident_bytes: tuple[int | None, int | None]
    outputs: Mapping[str, OutputDifference]
    samples: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values; a difference that is no number, or infinite, is null."""
        content = asdict(self) | {
            "inspections": [found.as_json() for found in self.inspections],
            "processor": processor(),
        }
        for difference in content["outputs"].values():
            for name, value in difference.items():
                if value is not None and not math.isfinite(value):
                    difference[name] = None
        return content


@dataclass(frozen=True)
class _Run:
    """Both graphs on the same rows."""

    samples: Samples
    sessions: tuple[Session, Session]
    arrays: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    answers: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    resident: tuple[int | None, int | None]


def compare(
    first: Path, second: Path, *, inputs: Path | None = None, sizes: Mapping[str, int] | None = None
) -> Comparison:
    """Inspect, run and time two graphs.

    Args:
        first: file, version folder or entry folder; differences are from its outputs.
        second: likewise.
        inputs: `.npz` file with rows; else the golden samples beside one of the graphs; else random rows.
        sizes: symbolic axis to size, for random rows and the work; 1 where it isn't named.

    Raises:
        ExportError: a graph can't be read or run, no rows are for both, or they have no output in common.
        OSError: a file can't be read.
    """
    files = (graph_path(first), graph_path(second))
    sizes = sizes or {}
    chosen = [_own_sizes(file, sizes) for file in files]
    if unknown := sorted(sizes.keys() - chosen[0].keys() - chosen[1].keys()):
        raise ExportError(f"--shape {unknown[0]}: neither graph has such a symbolic axis")
    inspections = (inspect_graph(files[0], chosen[0]), inspect_graph(files[1], chosen[1]))
    _require_common_input(inspections)
    run = _run(files, inspections, inputs, sizes)
    latency, notes = _latencies(run, inspections)
    if sizes and run.samples.stored:
        notes += (f"--shape is of the work; answers and latencies are of {run.samples.source}'s sizes",)
    outputs, others = _differences(run)
    counts = [dict(found.operators) for found in inspections]
    pairs = {name: (counts[0].get(name, 0), counts[1].get(name, 0)) for name in counts[0] | counts[1]}
    return Comparison(
        inspections=inspections,
        operators={name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        signature=(*_input_differences(inspections), *others),
        latency_ms=latency,
        resident_bytes=run.resident,
        outputs=outputs,
        samples=run.samples.source,
        notes=notes,
    )


def _own_sizes(file: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    names = {name for tensor in graph_inputs(read_graph(file)) for name in symbols(tensor).values()}
    return {name: size for name, size in sizes.items() if name in names}


def _run(
    files: tuple[Path, Path],
    inspections: tuple[Inspection, Inspection],
    inputs: Path | None,
    sizes: Mapping[str, int],
) -> _Run:
    """Run both on the first rows that both take."""
    failure = ExportError("there are no rows to run the graphs on")
    sides = (inspections[0].inputs, inspections[1].inputs)
    stored = [inputs] if inputs else [file.parent / "golden.npz" for file in files]
    for samples in candidates(sides, stored, None if inputs else sizes):
        try:
            return _run_on(samples, files, inspections)
        except ExportError as error:
            failure = ExportError(f"on {samples.source}: {error}")
    raise failure


def _run_on(samples: Samples, files: tuple[Path, Path], inspections: tuple[Inspection, Inspection]) -> _Run:
    arrays = (fit(samples.arrays, inspections[0].inputs), fit(samples.arrays, inspections[1].inputs))
    # First in a process of its own: there a graph may hang or crash.
    resident = (grown_bytes(files[0], arrays[0]), grown_bytes(files[1], arrays[1]))
    sessions = (Session(files[0]), Session(files[1]))
    answers = (_answer(sessions[0], arrays[0]), _answer(sessions[1], arrays[1]))
    return _Run(samples, sessions, arrays, answers, resident)


def _answer(session: Session, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All rows at once where that goes: then outputs need no batch axis."""
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    fits = lengths == {session.batch_size} or (
        session.batch_size is None and max(lengths, default=0) <= BATCH
    )
    return session.run(arrays) if fits else session.run_in_batches(arrays)


def _latencies(
    run: _Run, inspections: tuple[Inspection, Inspection]
) -> tuple[dict[str, tuple[float, float]], tuple[str, ...]]:
    """Medians by batch size, at the sizes that both graphs take."""
    fixed = {session.batch_size for session in run.sessions} - {None}
    batched = [is_batched(found.inputs) for found in inspections]
    if all(batched):
        sizes: tuple[int | None, ...] = BATCHES
    elif len(fixed) > 1:
        return {}, (f"no latency: the batch is fixed, to {' and to '.join(map(str, fixed))}",)
    else:
        sizes = tuple(fixed) or (None,)
    found = {}
    for size in sizes:
        sides = [arrays if size is None else cycle(arrays, size) for arrays in run.arrays]
        medians = interleave(dict(zip("ab", zip(run.sessions, sides, strict=True), strict=True)))
        found["all rows" if size is None else str(size)] = (medians["a"], medians["b"])
    return found, ()


def _differences(run: _Run) -> tuple[dict[str, OutputDifference], tuple[str, ...]]:
    """Of outputs that both have in one shape; and what else there is."""
    first, second = run.answers
    found, others = {}, []
    for name in first | second:
        if name not in first or name not in second:
            others.append(f"output {name}: only in {'A' if name in first else 'B'}")
        elif (a := _shape(first[name])) != (b := _shape(second[name])) or a is None:
            others.append(f"output {name}: {a or 'no tensor'} in A, {b or 'no tensor'} in B")
        else:
            found[name] = output_difference(second[name], first[name])
    if not found:
        raise ExportError(f"the graphs have no output to compare: {'; '.join(others)}")
    return found, tuple(others)


def _shape(array: Any) -> list[int] | None:
    return list(array.shape) if isinstance(array, np.ndarray) else None


def _require_common_input(inspections: tuple[Inspection, Inspection]) -> None:
    names = [{tensor.name for tensor in found.inputs} for found in inspections]
    if all(names) and not names[0] & names[1]:
        sides = " and ".join(", ".join(sorted(side)) for side in names)
        raise ExportError(f"the graphs have no input in common ({sides}): nothing can be compared")


def _input_differences(inspections: tuple[Inspection, Inspection]) -> Iterator[str]:
    sides = [{tensor.name: tensor for tensor in found.inputs} for found in inspections]
    for name in sides[0] | sides[1]:
        a, b = (side.get(name) for side in sides)
        if a is None or b is None:
            yield f"input {name}: only in {'A' if a else 'B'}"
        elif (a.type, a.shape) != (b.type, b.shape):
            yield f"input {name}: {a} in A, {b} in B"


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 1 after an error, or where an output is further off than `--tolerance`.
    """
    options = _parser().parse_args(arguments)
    sizes = given_sizes(options)
    try:
        found = compare(options.first, options.second, inputs=options.inputs, sizes=sizes)
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found.as_json(), indent=2, allow_nan=False) if options.json else table(found))
    code = 0
    for name, difference in found.outputs.items():
        if options.tolerance is not None and not difference.relative <= options.tolerance:
            print(
                f"error: output {name}: relative error {difference.relative:.3g}, "
                f"--tolerance {options.tolerance:g}",
                file=sys.stderr,
            )
            code = 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export compare",
        description="Put two ONNX graphs side by side: size, work, latency, memory and what they answer.",
    )
    what = ".onnx file, version folder or entry folder"
    parser.add_argument("first", type=Path, metavar="A", help=f"{what}; what B is held against")
    parser.add_argument("second", type=Path, metavar="B", help=what)
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="ROWS.npz",
        help="arrays named as the inputs (default: golden.npz beside A or B, else random numbers)",
    )
    add_shape_flag(parser, "sizes of symbolic axes in random rows (default: 1 each, 16 rows)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="exit with 1 where an output's largest difference is above X times A's largest value",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with everything in it")
    return parser
