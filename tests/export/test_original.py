"""What torch answers: which data, modules and metrics are refused before any work on a graph."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.original import run_module, run_original
from train.family import ExampleInputs, Metric, ServingData, ServingGraph

if TYPE_CHECKING:
    from collections.abc import Mapping

ROWS = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32)
NAN = ROWS.copy()
NAN[3, 0] = np.nan


def right(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
    return float((outputs["y"].argmax(1) == targets).mean())


def graph(module: nn.Module | None = None, rows: np.ndarray = ROWS, **data: Any) -> ServingGraph:
    given: dict[str, Any] = {
        "calibration": {},
        "held_out": {"x": rows},
        "targets": np.zeros(len(rows), int),
    } | data
    return ServingGraph(
        suffix="",
        module=(module or nn.Linear(8, 4)).eval(),
        example=ExampleInputs({"x": torch.ones(2, 8)}, {"x": {0: "batch"}}, ("y",)),
        data=ServingData(**given),
        metric=Metric("accuracy", higher_is_better=True, score=right),
    )


class Few(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 40:
            raise ValueError("too many")
        return x * 2


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x}


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.mean(), x


class Cut(nn.Module):
    """Answers as many numbers as the first of the rows' says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : int(x[:, 0].max().item())]


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        (graph(rows=ROWS[:0]), "held_out has no rows, expected at least 1"),
        (graph(targets=np.zeros(40, int)), r"targets are \[40\], expected an array of 80"),
        (graph(targets=[0] * 80), "targets are list, expected an array of 80"),
        (
            graph(rows=ROWS.astype(float)),
            r"held_out: 'x' is float64 \[80, 8\], the example says float32 \[-1, 8\]",
        ),
        (graph(rows=ROWS[:, :7]), r"'x' is float32 \[80, 7\], the example says float32 \[-1, 8\]"),
        (graph(held_out={"image": ROWS}), "held_out has no 'x', only image"),
        (graph(calibration={"x": ROWS[0]}), r"calibration: 'x' is float32 \[8\]"),
        (graph(held_out={"x": ROWS, "z": ROWS[:3]}), "held_out: expected arrays with as many rows each"),
        (graph(rows=NAN), "output 'y' holds NaN or infinity for 1 of 80 rows"),
        (graph(labels=("cat", "dog")), r"2 labels, but no output's last axis .*: 'y' float32 \[2, 4\]"),
        (graph(Named()), r"answers a dict of 1, expected a tensor \[rows, \.\.\.\] for each of y"),
        (graph(Mean()), "answers a tuple of 2, expected a tensor"),
        (graph(Few()), r"fails on 'x' float32 \[64, 8\] at .*test_original\.py:\d+ .*ValueError: too many"),
    ],
)
def test_what_nothing_can_be_held_against_is_refused(served: ServingGraph, expected: str) -> None:
    with pytest.raises(ExportError, match=expected):
        run_original(served)


def broken(_: Any, __: Any) -> float:
    raise KeyError("logits")


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (
            broken,
            r"metric 'accuracy' fails on torch's answers at .*test_original\.py:\d+ .*KeyError: 'logits'",
        ),
        (lambda *_: float("nan"), "metric 'accuracy' of torch's answers is nan"),
    ],
)
def test_a_metric_that_fails_is_named(score: Any, expected: str) -> None:
    served = graph()
    served = dataclasses.replace(served, metric=dataclasses.replace(served.metric, score=score))
    with pytest.raises(ExportError, match=expected):
        run_original(served)


@pytest.mark.parametrize("order", [1, -1])
def test_an_output_as_long_as_the_rows_say_is_refused(order: int) -> None:
    rows = np.ones((80, 8), np.float32)
    rows[:, 0] = np.arange(80)[::order] // 10 + 1
    with pytest.raises(ExportError, match=r"'y' is \[rows, \d\] and \[rows, \d\] for rows of one shape"):
        run_original(graph(Cut(), rows))
    with pytest.raises(ExportError, match="its size depends on what the rows hold"):
        run_original(graph(Cut(), rows[:: -7 * order]))  # one batch, and its first row alone
    assert run_module(Cut(), {"x": rows[:1] * 0 + 5}, ("y",))["y"].shape == (1, 5)


def test_labels_of_an_output_pass() -> None:
    assert run_original(graph(labels=tuple("abcd"))).outputs["y"].shape == (80, 4)
