"""What the network in torch answers, which every graph is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.errors import ExportError
from export.explanation import place_of, summary
from export.session import BATCH, INTRA_OP_THREADS, rows, take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from train.family import ServingGraph

    Arrays = Mapping[str, np.ndarray]

ALONE = 8
"""Rows that are run on their own, too."""


@dataclass(frozen=True)
class Original:
    """What the network in torch answers.

    Attributes:
        outputs: by name, of the held-out rows.
        score: the metric of them.
        other_shapes: the same for each of the data's `other_shapes`.
    """

    outputs: Mapping[str, np.ndarray]
    score: float
    other_shapes: tuple[Mapping[str, np.ndarray], ...]


def run_original(graph: ServingGraph) -> Original:
    """The torch module's answers to the held-out rows and to those of other shapes.

    Raises:
        ExportError: the rows aren't what the example says, or there are none; a dynamic axis has one size in
            all of them, so that nothing would show it to be dynamic; the module or the metric fails on them,
            or answers something else than numbers.
    """
    _require_rows(graph)
    _require_other_sizes(graph)
    _require_labelled_output(graph)
    names = tuple(graph.example.tensors)
    outputs = graph.example.outputs
    held_out = {name: graph.data.held_out[name] for name in names}
    original = run_module(graph.module, held_out, outputs)
    require_finite(original)
    _require_one_shape(graph.module, held_out, original)
    others = tuple(
        run_module(graph.module, {name: other[name] for name in names}, outputs)
        for other in graph.data.other_shapes
    )
    return Original(original, _score(graph, original), others)


def require_finite(answers: Arrays) -> None:
    """Refuse what no graph can be compared with.

    Raises:
        ExportError: an output of the module holds NaN or infinity.
    """
    for name, array in answers.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).reshape(len(array), -1).any(axis=1).sum())
            raise ExportError(
                f"the module's output {name!r} holds NaN or infinity for {bad} of {len(array)} rows; a graph "
                "can't be compared with that"
            )


def run_module(module: nn.Module, inputs: Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Outputs of a torch module by name, of any number of rows, on one thread as the graphs'.

    Raises:
        ExportError: the module fails, or answers rows in shapes of their own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(INTRA_OP_THREADS)
    try:
        with torch.no_grad():
            return _run_module(module, inputs, outputs)
    finally:
        torch.set_num_threads(threads)


def _run_module(module: nn.Module, inputs: Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, rows(inputs), BATCH):
        batch = take(inputs, start, start + BATCH)
        # Copies, so that a module which changes its inputs doesn't change the rows.
        try:
            result = module(*(torch.from_numpy(array.copy()) for array in batch.values()))
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(f"the module fails on {_described(batch)}{_at(error)}") from error
        parts.append((result,) if isinstance(result, torch.Tensor) else tuple(result))
        if len(parts[-1]) != len(outputs) or not all(_has_rows(part) for part in parts[-1]):
            raise ExportError(
                f"the module answers a {type(result).__name__} of {len(parts[-1])}, expected a tensor "
                f"[rows, ...] for each of {', '.join(outputs)}"
            )
    answers = {}
    for name, column in zip(outputs, zip(*parts, strict=True), strict=True):
        _require_alike(name, [tuple(part.shape) for part in column])
        answers[name] = torch.cat(column).numpy()
    return answers


def _has_rows(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _described(arrays: Arrays) -> str:
    return ", ".join(f"{name!r} {array.dtype} {list(array.shape)}" for name, array in arrays.items())


def _at(error: Exception) -> str:
    place = place_of(error)
    return f"{f' at {place}' if place else ''}: {summary(error)}"


def _require_alike(name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    found = sorted({shape[1:] for shape in shapes})
    if len(found) > 1:
        sizes = " and ".join(f"[rows{''.join(f', {size}' for size in shape)}]" for shape in found[:2])
        raise ExportError(
            f"output {name!r} is {sizes} for rows of one shape: its size depends on what the rows hold or "
            "how many they are, and a graph's doesn't; return the whole output and let the client cut it"
        )


def _require_one_shape(module: nn.Module, inputs: Arrays, answers: Arrays) -> None:
    """Rows alone, too: all of them together have one shape in any case."""
    for start in range(min(rows(inputs), ALONE)):
        try:
            alone = run_module(module, take(inputs, start, start + 1), tuple(answers))
        except ExportError:  # a network for batches of some size only
            return
        for name, array in alone.items():
            _require_alike(name, [answers[name].shape, array.shape])


def _require_rows(graph: ServingGraph) -> None:
    """Compare the data, which a user's function may have made, with the example."""
    count = _count("held_out", graph.data.held_out)
    targets = graph.data.targets
    if not isinstance(targets, np.ndarray) or targets.ndim == 0 or len(targets) != count:
        found = list(targets.shape) if isinstance(targets, np.ndarray) else type(targets).__name__
        raise ExportError(f"the data's targets are {found}, expected an array of {count}, one a held-out row")
    _require_example(graph, "held_out", graph.data.held_out)
    if graph.data.calibration:
        _require_example(graph, "calibration", graph.data.calibration)
    for other in graph.data.other_shapes:
        _count("other_shapes", other)
        _require_example(graph, "other_shapes", other)


def _count(what: str, arrays: Arrays) -> int:
    try:
        count = rows(arrays)
    except ExportError as error:
        raise ExportError(f"the data's {what}: {error}") from error
    if not count:
        raise ExportError(f"the data's {what} has no rows, expected at least 1")
    return count


def _require_example(graph: ServingGraph, what: str, arrays: Arrays) -> None:
    for name, tensor in graph.example.tensors.items():
        if name not in arrays:
            raise ExportError(f"the data's {what} has no {name!r}, only {', '.join(arrays) or 'nothing'}")
        array, dtype = arrays[name], str(tensor.dtype).removeprefix("torch.")
        open_axes = {0, *graph.example.dynamic_axes.get(name, {})}
        expected = [-1 if axis in open_axes else size for axis, size in enumerate(tensor.shape)]
        found = [-1 if axis in open_axes else size for axis, size in enumerate(array.shape)]
        if (array.dtype.name, found) != (dtype, expected):
            raise ExportError(
                f"the data's {what}: {name!r} is {array.dtype} {list(array.shape)}, the example says "
                f"{dtype} {expected}"
            )


def _require_labelled_output(graph: ServingGraph) -> None:
    if not (labels := graph.data.labels):
        return
    example = {name: tensor.numpy() for name, tensor in graph.example.tensors.items()}
    answers = run_module(graph.module, example, graph.example.outputs)
    if not any(array.ndim and array.shape[-1] == len(labels) for array in answers.values()):
        raise ExportError(
            f"{len(labels)} labels, but no output's last axis has as many numbers: {_described(answers)}"
        )


def _score(graph: ServingGraph, answers: Arrays) -> float:
    try:
        score = float(graph.metric.score(answers, graph.data.targets))
    except Exception as error:
        raise ExportError(f"metric {graph.metric.name!r} fails on torch's answers{_at(error)}") from error
    if not np.isfinite(score):
        raise ExportError(f"metric {graph.metric.name!r} of torch's answers is {score}, expected a number")
    return score


def _require_other_sizes(graph: ServingGraph) -> None:
    shapes = (graph.data.held_out, *graph.data.other_shapes)
    for name, axes in graph.example.dynamic_axes.items():
        for axis, symbol in axes.items():
            sizes = {arrays[name].shape[axis] for arrays in shapes}
            if axis > 0 and len(sizes) == 1:
                raise ExportError(
                    f"input {name!r}: axis {axis} ({symbol!r}) is to be dynamic, but all rows have the size "
                    f"{sizes.pop()}; nothing would prove it: add rows of another size to `other_shapes`"
                )
