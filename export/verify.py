"""The gates: does the graph compute what the network computes, and does int8 keep its metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.errors import ExportError
from export.session import BATCH, INTRA_OP_THREADS, Session, cycle, rows, take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from train.family import Metric, ServingGraph

    Arrays = Mapping[str, np.ndarray]

PARITY = 1e-4
BATCH_SIZES = (1, 2, 7, 32)


@dataclass(frozen=True)
class Difference:
    """How far an output is from the original's, over all held-out rows.

    Attributes:
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative: `max_abs` by the original's largest absolute value. (Number by number, the ones next to zero
            would decide.)
        cosine: of the two outputs as vectors of all their numbers.
    """

    max_abs: float
    mean_abs: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Verification:
    """What the held-out rows showed; every gate held.

    Attributes:
        metric: how the outputs were scored.
        rows: number of held-out rows.
        scores: the metric of "torch", "fp32" and, where there is one, "int8".
        tolerance: how much of the metric int8 was allowed to lose.
        differences: precision to output name to the difference from torch.
        original: the torch outputs by name.
    """

    metric: Metric
    rows: int
    scores: Mapping[str, float]
    tolerance: float
    differences: Mapping[str, Mapping[str, Difference]]
    original: Mapping[str, np.ndarray]


def verify(graph: ServingGraph, sessions: Mapping[str, Session], *, tolerance: float) -> Verification:
    """Hold the ONNX graphs against the original.

    Args:
        graph: its module, held-out rows, targets and metric are used.
        sessions: the loaded graphs, "fp32" and, where there is one, "int8".
        tolerance: int8's metric may be so much worse than torch's.

    Raises:
        ExportError: the fp32 graph's outputs are off by more than 1e-4 of the largest, int8's metric is too
            bad, or a row's answer depends on its batch.
    """
    data, metric = graph.data, graph.metric
    fp32 = sessions["fp32"]
    inputs = {name: data.held_out[name] for name in fp32.inputs}  # in the order of the module's arguments
    original = run_module(graph.module, inputs, fp32.outputs)
    for name, session in sessions.items():
        check_batches(name, session, inputs)
    outputs = {name: session.run_in_batches(inputs) for name, session in sessions.items()}
    result = Verification(
        metric=metric,
        rows=rows(inputs),
        scores={
            name: metric.score(out, data.targets) for name, out in {"torch": original, **outputs}.items()
        },
        tolerance=tolerance,
        differences={name: _differences(out, original) for name, out in outputs.items()},
        original=original,
    )
    check_parity(result)
    check_metric(result)
    return result


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
        result = module(*(torch.from_numpy(array) for array in batch.values()))
        parts.append((result,) if isinstance(result, torch.Tensor) else tuple(result))
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return dict(zip(outputs, columns, strict=True))


def difference(found: np.ndarray, original: np.ndarray) -> Difference:
    """Compare an output with the original's, both FP32 [rows, ...]."""
    off = np.abs(found.astype(np.float64) - original)
    largest = float(np.abs(original).max())
    norms = float(np.linalg.norm(found) * np.linalg.norm(original))
    return Difference(
        max_abs=float(off.max()),
        mean_abs=float(off.mean()),
        relative=float(off.max()) / max(largest, float(np.finfo(np.float32).tiny)),
        cosine=float(np.vdot(found, original)) / norms if norms else 0.0,
    )


def check_parity(result: Verification) -> None:
    """The fp32 gate.

    Raises:
        ExportError: an output is off by more than 1e-4 of the original's largest value.
    """
    for name, found in result.differences["fp32"].items():
        if not found.relative <= PARITY:
            raise ExportError(
                f"fp32 parity: output {name!r} of the graph is off by {found.relative:.2e} of the largest "
                f"value, allowed {PARITY:.0e} (max {found.max_abs:.3g}, mean {found.mean_abs:.3g}, "
                f"cosine {found.cosine:.6f}); "
                "an operator was translated wrongly: compare the module's layers with the graph's one by one"
            )


def check_metric(result: Verification) -> None:
    """The int8 gate.

    Raises:
        ExportError: the metric is worse than torch's by more than the tolerance.
    """
    if "int8" not in result.scores:
        return
    before, after = result.scores["torch"], result.scores["int8"]
    lost = result.metric.gain(before, over=after)
    if not lost <= result.tolerance:
        off = ", ".join(
            f"{name!r} cosine {found.cosine:.4f}" for name, found in result.differences["int8"].items()
        )
        raise ExportError(
            f"int8 {result.metric.name}: {100 * after:.2f} % against {100 * before:.2f} % before "
            f"quantization on {result.rows} held-out rows, a loss of {100 * lost:.2f} points where "
            f"{100 * result.tolerance:.2f} are allowed ({off}); calibrate with rows that look like those "
            "served, train longer, or allow more with --tolerance"
        )


def check_batches(name: str, session: Session, held_out: Arrays) -> None:
    """The batch gate: any batch size runs, and no row's answer depends on the others.

    Raises:
        ExportError: a batch size is refused, or rows differ from the same rows alone by more than 1e-4 of the
            largest value.
    """
    inputs = cycle(held_out, max(BATCH_SIZES))
    alone = [session.run(take(inputs, row, row + 1)) for row in range(max(BATCH_SIZES))]
    single = {output: np.concatenate([part[output] for part in alone]) for output in session.outputs}
    for size in BATCH_SIZES:
        for output, values in session.run(take(inputs, 0, size)).items():
            _check_batch(f"{name} output {output!r}", values, single[output][:size])


def _check_batch(what: str, batched: np.ndarray, alone: np.ndarray) -> None:
    if len(batched) != len(alone):
        raise ExportError(f"{what}: {len(alone)} rows in, {len(batched)} out; the batch axis isn't dynamic")
    found = difference(batched, alone)
    if not found.relative <= PARITY:
        raise ExportError(
            f"{what}: rows in a batch of {len(alone)} differ from those rows alone by {found.relative:.1e} "
            f"of the largest value, allowed {PARITY:.0e}; the graph mixes the rows of a batch (dynamic "
            "quantization does, and so does batch norm in training mode)"
        )


def _differences(found: Arrays, original: Arrays) -> dict[str, Difference]:
    return {name: difference(found[name], original[name]) for name in original}
