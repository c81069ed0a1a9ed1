"""Metrics of a network without targets: does a graph answer what the module answers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np

from export.errors import ExportError
from train.family import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Arrays = Mapping[str, np.ndarray]

MetricName = Literal["agreement", "cosine"]


def _classes(answers: Arrays) -> str | None:
    """The first output that can be scores of classes."""
    for name, array in answers.items():
        if array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] > 1:  # noqa: PLR2004 - [n, classes]
            return name
    return None


def accuracy(answers: Arrays, targets: np.ndarray) -> tuple[Metric, np.ndarray]:
    """Accuracy of the first output [n, classes].

    Args:
        answers: the module's outputs by name.
        targets: class indices INT [n].

    Raises:
        ExportError: there is no such output, or it has fewer classes.
    """
    name = _classes(answers)
    if name is None:
        shapes = ", ".join(f"{key!r} {list(array.shape)}" for key, array in answers.items())
        raise ExportError(f"there are targets, but no output is FP32 [n, classes]: {shapes}")
    classes = answers[name].shape[1]
    if not (targets.min() >= 0 and targets.max() < classes):
        raise ExportError(
            f"targets are {targets.min()} to {targets.max()}, but output {name!r} has {classes} classes: "
            f"expected 0 to {classes - 1}"
        )
    return Metric("accuracy", higher_is_better=True, score=functools.partial(same_class, name)), targets


def agreement(answers: Arrays, wanted: MetricName | None) -> tuple[Metric, np.ndarray]:
    """How far a graph's outputs are the module's.

    On the best class, where there is an output [n, classes]; on the numbers, where all outputs are integers;
    else the cosine between them, the lowest where there are several.

    Args:
        answers: the module's outputs by name, [n, ...].
        wanted: one of these; None chooses.

    Returns:
        The metric, and the targets that it compares with.

    Raises:
        ExportError: the outputs have nothing to judge so.
    """
    floats = [name for name, array in answers.items() if array.dtype.kind == "f"]
    first = next(iter(answers))
    if not floats:
        return _metric("agreement", functools.partial(same_numbers, first)), answers[first]
    name = _classes(answers)
    if wanted == "agreement" and name is None:
        raise ExportError("metric agreement: no output is FP32 [n, classes]; judge by cosine")
    if name is not None and wanted != "cosine":
        return _metric("agreement", functools.partial(same_class, name)), answers[name].argmax(axis=1)
    return _metric("cosine", functools.partial(lowest_cosine, floats)), _columns(answers, floats)


def _metric(name: str, score: functools.partial[float]) -> Metric:
    return Metric(name, higher_is_better=True, score=score)


def same_class(output: str, outputs: Arrays, targets: np.ndarray) -> float:
    """Share of the rows [n, classes] whose highest score is that of the target class [n]."""
    return float((outputs[output].argmax(axis=1) == targets).mean())


def same_numbers(output: str, outputs: Arrays, targets: np.ndarray) -> float:
    """Share of an output's numbers that equal the targets, [n, ...]."""
    return float((outputs[output] == targets).mean())


def lowest_cosine(names: Sequence[str], outputs: Arrays, targets: np.ndarray) -> float:
    """The lowest of the outputs' cosines, each over all its numbers; targets as `_columns` lays them out."""
    cosines, start = [], 0
    for name in names:
        found = outputs[name].reshape(len(targets), -1).astype(np.float64)
        expected = targets[:, start : start + found.shape[1]]
        start += found.shape[1]
        norms = float(np.linalg.norm(found) * np.linalg.norm(expected))
        cosines.append(
            float(np.vdot(found, expected)) / norms if norms else float(np.array_equal(found, expected))
        )
    return min(cosines)


def _columns(outputs: Arrays, names: Sequence[str]) -> np.ndarray:
    """Outputs side by side, FP64 [n, all their numbers of a row]."""
    columns = [outputs[name].reshape(len(outputs[name]), -1).astype(np.float64) for name in names]
    return np.concatenate(columns, axis=1)
