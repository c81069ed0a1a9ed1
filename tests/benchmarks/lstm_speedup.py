"""How much faster and smaller int8 LSTMs are, and what it costs to keep the rows of a batch independent.

96 steps of 7 inputs, one thread: a plain LSTM whose last output goes through a linear layer to 24 forecasts,
and this project's forecaster, which reads each input as a row of its own. Given a checkpoint of the latter,
it is measured in the untrained one's place, and its mse on the held-out rows is printed too.

Timings are printed, not judged. Run: python tests/benchmarks/lstm_speedup.py [CHECKPOINT]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from export.graph import export_graph, serialize
from export.latency import BATCHES, measure
from export.passes.bound_ranges import BoundRanges
from export.passes.dynamic_int8 import DynamicInt8
from export.session import Session, take
from export.targets import processor
from train import lstm
from train.checkpoint import load_checkpoint
from train.family import ExampleInputs

if TYPE_CHECKING:
    import onnx_ir as ir

    from train.family import ServingGraph

TIME, INPUTS, HORIZON = 96, 7, 24
ROWS = 64
SERIES = np.random.default_rng(0).standard_normal((ROWS, TIME, INPUTS), dtype=np.float32)
EXAMPLE = ExampleInputs(
    {"series": torch.from_numpy(SERIES[:2])}, {"series": {0: "batch", 1: "time"}}, ("forecast",)
)


class Plain(nn.Module):
    """One LSTM over all inputs, and a linear layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, hidden, batch_first=True)
        self.head = nn.Linear(hidden, HORIZON)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, time, inputs] to FP32 [batch, horizon]."""
        outputs, _ = self.lstm(series)
        forecast: torch.Tensor = self.head(outputs[:, -1])
        return forecast


def folded(hidden: int) -> nn.Module:
    """This project's forecaster, untrained: 7 rows in each of the client's."""
    columns = {"columns": [str(i) for i in range(INPUTS)], "mean": [0.0] * INPUTS, "std": [1.0] * INPUTS}
    size = {"cell": "lstm", "hidden": hidden, "layers": 1, "horizon": TIME, "dropout": 0.0}
    return lstm.SeriesInput(lstm.build_model(columns | size), columns)


def variants(graph: ir.Model, calibration: dict[str, np.ndarray]) -> dict[str, Session]:
    """Load it as it is, in int8, and in int8 with bounded ranges; print the sizes."""
    bounded = BoundRanges(calibration).apply(graph.clone()).model
    graphs = {
        "fp32": graph,
        "int8": DynamicInt8().apply(graph.clone()).model,
        "int8 bounded": DynamicInt8().apply(bounded).model,
    }
    content = {name: serialize(model) for name, model in graphs.items()}
    sizes = (f"{name} {len(c)} (x {len(c) / len(content['fp32']):.3f})" for name, c in content.items())
    print("  bytes:", ", ".join(sizes))
    return {name: Session(c) for name, c in content.items()}


def compare(title: str, graph: ir.Model, rows: dict[str, np.ndarray]) -> dict[str, Session]:
    """Print sizes, times, and how far a row alone is from the same row in a batch of 8."""
    print(title)
    sessions = variants(graph, rows)
    for batch in BATCHES:
        medians = measure(sessions, rows, batch)
        times = (f"{name} {1000 * ms:.0f} µs (x {medians['fp32'] / ms:.2f})" for name, ms in medians.items())
        print(f"  batch {batch}:", ", ".join(times))
    for name, session in sessions.items():
        together = session.run(take(rows, 0, 8))["forecast"]
        alone = np.concatenate([session.run(take(rows, row, row + 1))["forecast"] for row in range(8)])
        off = float(np.abs(together - alone).max() / np.abs(alone).max())
        print(f"  {name}: a row alone and in a batch of 8 differ by {off:.1e} of the largest value")
    return sessions


def print_errors(graph: ServingGraph, sessions: dict[str, Session]) -> None:
    """The mse over all held-out rows, one at a time."""
    data = graph.data
    for name, session in sessions.items():
        rows = (
            session.run(take(data.held_out, row, row + 1))["forecast"] for row in range(len(data.targets))
        )
        mse = graph.metric.score({"forecast": np.concatenate(list(rows))}, data.targets)
        print(f"  {name}: {graph.metric.name} {mse:.5f}")


def main() -> None:
    """Measure all, side by side."""
    torch.manual_seed(0)
    print(f"processor: {processor()}")
    for hidden in (64, 128, 256):
        compare(f"LSTM({hidden})", export_graph(Plain(hidden).eval(), EXAMPLE), {"series": SERIES})
    if len(sys.argv) > 1:
        graph, _ = lstm.serving_graphs(load_checkpoint(Path(sys.argv[1])), None)
        rows = dict(graph.data.calibration)
        print_errors(graph, compare(sys.argv[1], export_graph(graph.module, graph.example), rows))
        return
    for hidden in (64, 128):
        module = folded(hidden).eval()
        compare(f"LSTM({hidden}), a row per input", export_graph(module, EXAMPLE), {"series": SERIES})


if __name__ == "__main__":
    main()
