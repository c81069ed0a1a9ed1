"""The gate of the metric: is a graph as good as the network it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.errors import GateError
from export.session import rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.original import Original
    from export.recipes import Precision
    from train.family import Metric, ServingGraph

    Arrays = Mapping[str, np.ndarray]


class MetricError(GateError):
    """A graph's metric is too much worse than the original's.

    Attributes:
        worse: by how much; see `lost`.
    """

    def __init__(self, message: str, worse: float) -> None:
        super().__init__(message)
        self.worse = worse


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
    metric, count = graph.metric, rows(graph.data.held_out)
    score = metric.score(outputs, graph.data.targets)
    worse = lost(metric, original.score, score)
    if worse <= tolerance:
        return score
    unit = "%" if metric.relative else "points"
    after, before = (figure(value, percentage=is_percentage(metric)) for value in (score, original.score))
    raise MetricError(
        f"{precision} {metric.name}: {after} against {before} in PyTorch on {count} held-out rows, worse by "
        f"{100 * worse:.2f} {unit} where {100 * tolerance:.2f} are allowed; {_advice(precision)}, or allow "
        f"more with --tolerance{_too_few(metric, count, tolerance)}",
        worse,
    )


def _advice(precision: Precision) -> str:
    if precision == "int8":
        return "calibrate with rows that look like those served, train longer"
    return "take a precision of more bits" if precision != "fp32" else "look for NaN in the outputs"


def _too_few(metric: Metric, count: int, tolerance: float) -> str:
    if not is_percentage(metric) or 1 / count <= tolerance:
        return ""
    return f" (one row of {count} is {100 / count:.2f} points: more rows would tell more)"


def is_percentage(metric: Metric) -> bool:
    """Whether people write it as a percentage, as accuracy; errors and perplexities they write plain."""
    return metric.higher_is_better and not metric.relative


def figure(value: float, *, percentage: bool) -> str:
    """A metric's value in text."""
    return f"{100 * value:.2f} %" if percentage else f"{value:.4f}"
