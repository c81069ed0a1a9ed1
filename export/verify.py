"""The gates: does a graph compute what the network computes, for every batch and shape, and is it as good."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from export.difference import OutputDifference, output_difference
from export.errors import ExportError
from export.session import cycle, rows, take

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.original import Original
    from export.recipes import Precision
    from export.session import Session
    from train.family import Metric, ServingGraph

    Arrays = Mapping[str, np.ndarray]

PARITY = 1e-4
ROWS_APART = 1e-5
BATCH_SIZES = (1, 2, 7, 32)


class MetricError(ExportError):
    """A graph's metric is too much worse than the original's; another way to quantize may do better."""


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
    exact: bool = False,
    mixes_rows: bool = False,
) -> Findings:
    """Hold an ONNX graph against the original.

    Args:
        precision: of the graph.
        session: the loaded graph.
        graph: its held-out rows, targets and metric are used.
        original: what `export.original.run_original` gave.
        tolerance: how much worse the metric may be; see `train.family.Metric.relative`.
        exact: whether a row's answer must be bit for bit the same alone and among others.
        mixes_rows: whether the graph is known to; how much is measured all the same.

    Raises:
        MetricError: the metric is too bad.
        ExportError: the outputs of an fp32 graph are off by more than 1e-4 of the largest, a row's answer
            depends on its batch, or a dynamic axis isn't dynamic.
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
    return Findings(
        score=score,
        tolerance=tolerance,
        differences=differences,
        other_shapes=check_shapes(precision, session, graph, original),
        rows_apart=check_rows(precision, session, graph.data.held_out, exact=exact, mixes_rows=mixes_rows),
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


def check_parity(differences: Differences, limit: float = PARITY) -> None:
    """The fp32 gate.

    Raises:
        ExportError: an output is off by more than `limit` of the original's largest value.
    """
    for name, found in differences.items():
        if not found.relative <= limit:
            raise ExportError(
                f"fp32 parity: output {name!r} of the graph is off by {found.relative:.2e} of the largest "
                f"value, allowed {limit:.0e}; an operator was translated wrongly: compare the module's "
                "layers with the graph's one by one"
            )


def lost(metric: Metric, before: float, after: float) -> float:
    """By how much the metric got worse: of a relative one as a part of it, else as a difference."""
    worse = metric.gain(before, over=after)
    return worse / max(abs(before), float(np.finfo(np.float32).tiny)) if metric.relative else worse


def check_score(
    precision: Precision, graph: ServingGraph, original: Original, outputs: Arrays, tolerance: float
) -> float:
    """The metric's gate.

    Returns:
        The metric.

    Raises:
        MetricError: it is worse than torch's by more than the tolerance.
    """
    metric = graph.metric
    score = metric.score(outputs, graph.data.targets)
    worse = lost(metric, original.score, score)
    if worse <= tolerance:
        return score
    off = ", ".join(
        f"{name!r} off by {found.relative:.1e} of the largest value"
        for name, found in compare(outputs, original.outputs).items()
    )
    unit = "%" if metric.relative else "points"
    after, before = (figure(value, percentage=is_percentage(metric)) for value in (score, original.score))
    raise MetricError(
        f"{precision} {metric.name}: {after} against {before} in PyTorch on "
        f"{rows(graph.data.held_out)} held-out rows, worse by {100 * worse:.2f} {unit} where "
        f"{100 * tolerance:.2f} are allowed ({off}); calibrate with rows that look like those served, train "
        "longer, or allow more with --tolerance"
    )


def is_percentage(metric: Metric) -> bool:
    """Whether people write it as a percentage, as accuracy; errors and perplexities they write plain."""
    return metric.higher_is_better and not metric.relative


def figure(value: float, *, percentage: bool) -> str:
    """A metric's value in text."""
    return f"{100 * value:.2f} %" if percentage else f"{value:.4f}"


def check_rows(
    precision: Precision,
    session: Session,
    held_out: Arrays,
    *,
    exact: bool = False,
    mixes_rows: bool = False,
) -> dict[str, float]:
    """The batch gate: any batch size runs, and no row's answer depends on the others.

    Returns:
        Output name to the largest difference between a row alone and among others, by the largest value;
        empty where the batch was made constant.

    Raises:
        ExportError: a batch size is refused, or rows differ by more than 1e-5 of the largest value; at all,
            where `exact`, as static int8 is: its ranges are constants and its sums integers.
    """
    if session.batch_size is not None:
        return {}
    inputs = cycle(held_out, max(BATCH_SIZES))
    alone = [session.run(take(inputs, row, row + 1)) for row in range(max(BATCH_SIZES))]
    single = {output: np.concatenate([part[output] for part in alone]) for output in session.outputs}
    limit = 0.0 if exact else ROWS_APART
    apart = dict.fromkeys(session.outputs, 0.0)
    for size in BATCH_SIZES:
        for output, values in session.run(take(inputs, 0, size)).items():
            found = _rows_apart(f"{precision} output {output!r}", values, single[output][:size])
            if not (found <= limit or mixes_rows):
                raise ExportError(
                    f"{precision} output {output!r}: rows in a batch of {size} differ from those alone by "
                    f"{found:.1e} of the largest value, allowed {limit:.0e}; the graph mixes the rows of a "
                    "batch (batch norm in training mode does, and so does arithmetic over axis 0)"
                )
            apart[output] = max(apart[output], found)
    return apart


def _rows_apart(what: str, batched: np.ndarray, alone: np.ndarray) -> float:
    if len(batched) != len(alone):
        raise ExportError(f"{what}: {len(alone)} rows in, {len(batched)} out; the batch axis isn't dynamic")
    return output_difference(batched, alone).relative


def check_shapes(
    precision: Precision, session: Session, graph: ServingGraph, original: Original
) -> dict[str, float]:
    """The gate of dynamic axes: rows of other lengths get what torch answers.

    Returns:
        Output name to the largest difference from torch, by the largest value.

    Raises:
        ExportError: an fp32 graph is off by more than 1e-4, or a graph answers another shape.
    """
    largest: dict[str, float] = {}
    for inputs, expected in zip(graph.data.other_shapes, original.other_shapes, strict=True):
        if not _fits(session, inputs):
            continue
        differences = compare(session.run_in_batches(inputs), expected)
        if precision == "fp32":
            check_parity(differences)
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
