"""The gates: does a graph compute what the network computes, for every batch and shape, and is it as good."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from export.difference import OutputDifference, output_difference
from export.errors import ExportError, GateError
from export.metric_gate import check_score
from export.session import cycle, take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from export.original import Original
    from export.recipes import Precision
    from export.session import Session
    from train.family import ServingGraph

    Arrays = Mapping[str, np.ndarray]

PARITY = 1e-4
ROWS_APART = 1e-5
BATCH_SIZES = (1, 2, 7, 32)
LIKENESS = 0.95
"""How alike each output of a quantized graph must be: the cosine, or of integers the share of equal ones."""


Differences = dict[str, OutputDifference]
"""By output name."""


@dataclass(frozen=True)
class Findings:
    """What the gates measured of a graph; all of them held.

    Attributes:
        score: the metric on the held-out rows.
        tolerance: how much worse than torch's it was allowed to be.
        differences: from torch, on the held-out rows.
        other_shapes: output name to the largest relative difference from torch at other lengths.
        rows_apart: output name to the largest relative difference between a row alone and among others.
        providers: execution provider to the differences from torch there, or why it can't run the graph; of
            those that this machine has besides the CPU's.
    """

    score: float
    tolerance: float
    differences: Differences
    other_shapes: Mapping[str, float]
    rows_apart: Mapping[str, float]
    providers: Mapping[str, Differences | str] = field(default_factory=dict)


def verify(
    precision: Precision,
    session: Session,
    graph: ServingGraph,
    original: Original,
    *,
    tolerance: float,
    mixes_rows: bool = False,
) -> Findings:
    """Hold an ONNX graph against the original.

    Args:
        precision: of the graph.
        session: the loaded graph.
        graph: its held-out rows, targets and metric are used.
        original: what `export.original.run_original` gave.
        tolerance: how much worse the metric may be; see `train.family.Metric.relative`.
        mixes_rows: whether the graph is known to; how much is measured all the same.

    Raises:
        MetricError: the metric is too bad.
        GateError: an output is unlike the original's, or a row's answer depends on its batch.
        ExportError: the outputs of an fp32 graph are off by more than 1e-4 of the largest, or a dynamic axis
            isn't dynamic.
    """
    if not _fits(session, graph.data.held_out):
        found = {name: list(array.shape[1:]) for name, array in graph.data.held_out.items()}
        raise ExportError(
            f"--fix: expected the sizes of the held-out rows, which are {found} after the batch"
        )
    outputs = session.run_in_batches(graph.data.held_out)
    differences = compare(outputs, original.outputs)
    if precision == "fp32":
        check_parity(differences)
    score = check_score(precision, graph, original, outputs, tolerance)
    check_likeness(precision, differences)
    return Findings(
        score=score,
        tolerance=tolerance,
        differences=differences,
        other_shapes=check_shapes(precision, session, graph, original),
        rows_apart=check_rows(precision, session, graph.data.held_out, mixes_rows=mixes_rows),
    )


def compare(found: Arrays, original: Arrays) -> Differences:
    """Each output of the original's against the one found.

    Raises:
        ExportError: one has another shape.
    """
    for name, array in original.items():
        if found[name].shape != array.shape:
            raise ExportError(
                f"output {name!r}: the graph answers {list(found[name].shape)}, torch {list(array.shape)}"
            )
    return {name: output_difference(found[name], original[name]) for name in original}


def check_parity(differences: Differences) -> None:
    """The fp32 gate.

    Raises:
        ExportError: an output is off by more than 1e-4 of the original's largest value.
    """
    for name, found in differences.items():
        if not found.relative <= PARITY:
            raise ExportError(
                f"fp32 parity: output {name!r} of the graph is off by {found.relative:.2e} of the largest "
                f"value, allowed {PARITY:.0e}; an operator was translated wrongly: compare the module's "
                "layers with the graph's one by one"
            )


def check_likeness(precision: Precision, differences: Differences) -> None:
    """The gate of outputs that the metric doesn't read.

    Raises:
        GateError: one is unlike the original's, or not finite.
    """
    require_finite(precision, differences)
    for name, found in differences.items():
        alike = found.equal if found.cosine is None else max(found.cosine, found.equal)
        if not alike >= LIKENESS:
            raise GateError(
                f"{precision} output {name!r}: {alike:.3f} alike to PyTorch's (cosine, or share of equal "
                f"numbers), expected at least {LIKENESS}; take a precision of more bits or leave the output "
                "out"
            )


def require_finite(precision: Precision, differences: Differences) -> None:
    """Refuse NaN and infinity, of which torch's answers have none.

    Raises:
        GateError: an output holds some; the cosine leaves such numbers out.
    """
    for name, found in differences.items():
        if not math.isfinite(found.relative):
            raise GateError(
                f"{precision} output {name!r} holds NaN or infinity where PyTorch's is finite: a number has "
                "left the precision's range; take another precision"
            )


def check_rows(
    precision: Precision, session: Session, held_out: Arrays, *, mixes_rows: bool = False
) -> dict[str, float]:
    """The batch gate: any batch size runs, and no row's answer depends on the others.

    Returns:
        Output name to the largest difference between a row alone and among others, by the largest value;
        empty where the batch was made constant.

    Raises:
        GateError: rows differ by more than 1e-5 of the largest value.
        ExportError: a batch size is refused, or all rows are alike, so that nothing would show.
    """
    if session.batch_size is not None:
        return {}
    if all((array == array[:1]).all() for array in held_out.values()):
        raise ExportError(
            "the held-out rows are all alike; nothing would show that a row's answer doesn't depend on the "
            "others: give rows that differ"
        )
    inputs = cycle(held_out, max(BATCH_SIZES))
    alone = [session.run(take(inputs, row, row + 1)) for row in range(max(BATCH_SIZES))]
    apart = dict.fromkeys(session.outputs, 0.0)
    for size in BATCH_SIZES:
        for output, values in session.run(take(inputs, 0, size)).items():
            single = [part[output] for part in alone[:size]]
            found = _rows_apart(f"{precision} output {output!r}", values, single)
            if not (found <= ROWS_APART or mixes_rows):
                raise GateError(
                    f"{precision} output {output!r}: rows in a batch of {size} differ from those alone by "
                    f"{found:.1e} of the largest value, allowed {ROWS_APART:.0e}; the graph mixes the rows "
                    "of a batch (batch norm in training mode does, and so does arithmetic over axis 0)"
                )
            apart[output] = max(apart[output], found)
    return apart


def _rows_apart(what: str, batched: np.ndarray, alone: Sequence[np.ndarray]) -> float:
    if len(batched) != len(alone):
        raise ExportError(f"{what}: {len(alone)} rows in, {len(batched)} out; the batch axis isn't dynamic")
    if any(part.shape[1:] != batched.shape[1:] for part in alone):
        raise ExportError(
            f"{what}: its shape depends on what the rows hold, {list(alone[0].shape[1:])} for the first "
            f"alone and {list(batched.shape[1:])} among others; give it one shape"
        )
    single = np.concatenate(alone)
    # By the larger of the two: what is zero alone may not be among others.
    largest = max(float(np.abs(array).max(initial=0.0)) for array in (batched, single))
    off = output_difference(batched, single).max_abs
    return (off or 0.0) / max(largest, float(np.finfo(np.float32).tiny))


def check_shapes(
    precision: Precision, session: Session, graph: ServingGraph, original: Original
) -> dict[str, float]:
    """The gate of dynamic axes: rows of other lengths get what torch answers.

    Returns:
        Output name to the largest difference from torch, by the largest value.

    Raises:
        GateError: a graph answers NaN or infinity.
        ExportError: an fp32 graph is off by more than 1e-4, or a graph answers another shape.
    """
    largest: dict[str, float] = {}
    for inputs, expected in zip(graph.data.other_shapes, original.other_shapes, strict=True):
        if not _fits(session, inputs):
            continue
        differences = compare(session.run_in_batches(inputs), expected)
        if precision == "fp32":
            check_parity(differences)
        require_finite(precision, differences)
        for name, found in differences.items():
            largest[name] = max(largest.get(name, 0.0), found.relative)
    return largest


def _fits(session: Session, inputs: Arrays) -> bool:
    """Whether the rows have the sizes of axes that were made constant."""
    return all(
        not isinstance(size, int) or size == found
        for name, shape in session.input_shapes.items()
        for size, found in zip(shape[1:], inputs[name].shape[1:], strict=True)
    )
