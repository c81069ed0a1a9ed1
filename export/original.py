"""What the network in torch answers, which every graph is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from export.errors import ExportError
from export.session import BATCH, INTRA_OP_THREADS, rows, take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import nn

    from train.family import ServingGraph

    Arrays = Mapping[str, np.ndarray]


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
        ExportError: a dynamic axis has one size in all of them, so that nothing would show it to be dynamic.
    """
    _require_other_sizes(graph)
    names = tuple(graph.example.tensors)
    outputs = graph.example.outputs
    original = run_module(graph.module, {name: graph.data.held_out[name] for name in names}, outputs)
    others = tuple(
        run_module(graph.module, {name: other[name] for name in names}, outputs)
        for other in graph.data.other_shapes
    )
    return Original(original, graph.metric.score(original, graph.data.targets), others)


def run_module(module: nn.Module, inputs: Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Outputs of a torch module by name, of any number of rows, on one thread as the graphs'."""
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
        result = module(*(torch.tensor(array) for array in batch.values()))
        parts.append((result,) if isinstance(result, torch.Tensor) else tuple(result))
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return dict(zip(outputs, columns, strict=True))


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
