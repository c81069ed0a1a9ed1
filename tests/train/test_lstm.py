import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from train import lstm
from train.checkpoint import Checkpoint, CheckpointInfo, current_versions
from train.data.download import DataError
from train.data.series import load_series_data
from train.family import ServingGraph, Task
from train.lstm import Forecaster

CELLS = ("lstm", "gru", "rnn")
SMALL = lstm.Recipe(hidden=8, context=24, horizon=12, batch_size=16, epoch_windows=64, precision="float32")


def serve(recipe: lstm.Recipe) -> tuple[Task, ServingGraph, ServingGraph]:
    """A task, and the two graphs of its network, whose head answers more than nothing."""
    task = lstm.task(recipe, None)
    assert isinstance(task.model, Forecaster)
    nn.init.normal_(task.model.head.weight, std=0.1)
    info = CheckpointInfo(
        family="lstm",
        model=task.arguments,
        recipe=dataclasses.asdict(recipe),
        metrics={},
        baselines={},
        dataset=task.dataset,
        dataset_sha256=task.dataset_sha256,
        seed=0,
        epoch=0,
        versions=current_versions(),
    )
    whole, step = lstm.serving_graphs(Checkpoint(info, task.model.eval(), {}), None)
    return task, whole, step


@torch.no_grad()
def run(graph: ServingGraph, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = graph.module(*[torch.from_numpy(np.ascontiguousarray(array)) for array in rows.values()])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: output.numpy() for name, output in zip(graph.example.outputs, outputs, strict=True)}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_row_by_row_gives_what_the_whole_look_back_gives(cell: Any, layers: int) -> None:
    _, whole, step = serve(dataclasses.replace(SMALL, cell=cell, layers=layers))
    series = whole.data.held_out["series"][::500]
    expected = run(whole, {"series": series})["forecast"]
    state = {name: np.zeros_like(step.data.held_out[name][: len(series)]) for name in step.example.tensors}
    for row in range(series.shape[1]):
        outputs = run(step, state | {"x": series[:, row]})
        state = {name: outputs.get(f"{name}_out", state[name]) for name in state}
    np.testing.assert_allclose(outputs["forecast"], expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, series[:, -1:], atol=0.01)  # the network says more than the last value


@pytest.mark.parametrize("cell", CELLS)
def test_the_graphs_have_the_shapes_that_they_promise(cell: Any) -> None:
    task, whole, step = serve(dataclasses.replace(SMALL, cell=cell, layers=2))
    states = ("h", "c") if cell == "lstm" else ("h",)
    assert (whole.suffix, step.suffix) == ("", "_step")
    assert tuple(step.example.tensors) == ("x", *states)
    assert step.example.outputs == ("forecast", *(f"{name}_out" for name in states))
    assert whole.data.held_out["series"].shape == (14400 - 11520 - 12 + 1, 24, 7)
    assert step.data.held_out["x"].shape == (1000, 7)
    assert whole.example.dynamic_axes == {"series": {0: "batch", 1: "time"}}
    assert step.example.dynamic_axes == {name: {0: "batch"} for name in ("x", *states)}
    others = [rows["series"] for rows in whole.data.other_shapes]
    assert [series.shape for series in others] == [(4, 1, 7), (4, 17, 7), (4, 200, 7)]
    assert all(run(whole, {"series": series})["forecast"].shape == (4, 12, 7) for series in others)
    assert np.array_equal(others[0][0, -1], whole.data.held_out["series"][0, -1])  # the same first forecast
    for graph in (whole, step):
        outputs = run(graph, {name: tensor.numpy() for name, tensor in graph.example.tensors.items()})
        assert outputs["forecast"].shape == (2, 12, 7)
        assert all(outputs[f"{name}_out"].shape == (2, 2, 7, 8) for name in states if graph is step)
        for rows in (graph.data.calibration, graph.data.held_out):
            assert {name: array.shape[1:] for name, array in rows.items()} == {
                name: tensor.shape[1:] for name, tensor in graph.example.tensors.items()
            }
            assert all(array.dtype == np.float32 for array in rows.values())
        assert graph.data.targets.shape[1:] == (12, 7)
    assert task.arguments["columns"][-1] == "OT"


def test_the_served_metric_in_raw_units_is_the_test_figure() -> None:
    task, whole, step = serve(SMALL)
    figure = task.test(task.model)["mse"]
    assert whole.metric.relative
    assert whole.metric.score(run(whole, whole.data.held_out), whole.data.targets) == pytest.approx(
        figure, rel=1e-4
    )
    # The step's rows are a third of the same windows.
    assert step.metric.score(run(step, step.data.held_out), step.data.targets) == pytest.approx(
        figure, rel=0.05
    )


def test_the_untrained_network_answers_the_last_value() -> None:
    task = lstm.task(SMALL, None)
    assert task.validate(task.model) == pytest.approx(task.trivial.validation, rel=0.01)
    assert task.test(task.model)["mse"] == pytest.approx(task.trivial.test, rel=0.01)
    losses = [task.loss(task.model, batch).item() for batch in task.batches(torch.Generator().manual_seed(0))]
    assert np.mean(losses) == pytest.approx(task.first_loss, rel=0.3)  # 64 windows against a thousand


def test_a_short_training_is_better_than_the_last_value() -> None:
    task = lstm.task(dataclasses.replace(SMALL, horizon=24, context=48, hidden=16), None)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for batch in task.batches(generator):
            optimizer.zero_grad()
            task.loss(task.model.train(), batch).backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
    assert task.validate(task.model) < 0.85 * task.trivial.validation
    assert task.test(task.model)["mse"] < 0.85 * task.trivial.test


@pytest.mark.parametrize("cell", CELLS)
def test_every_parameter_gets_a_gradient(cell: Any) -> None:
    task = lstm.task(dataclasses.replace(SMALL, cell=cell, layers=2), None)
    task.loss(task.model, next(task.batches(torch.Generator().manual_seed(0)))).backward()  # type: ignore[no-untyped-call]  # torch's
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in task.model.parameters())


def test_first_weights_are_orthogonal_and_the_forget_gate_is_open() -> None:
    model = lstm.task(SMALL, None).model
    assert isinstance(model, Forecaster)
    weights = dict(model.cell.named_parameters())
    for gate in weights["weight_hh_l0"].chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(8), atol=1e-5)
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    assert [set(gate.tolist()) for gate in bias.chunk(4)] == [{0.0}, {1.0}, {0.0}, {0.0}]


def test_columns_are_forecast_by_themselves() -> None:
    task, whole, _ = serve(SMALL)
    series = whole.data.held_out["series"][:2].copy()
    before = run(whole, {"series": series})["forecast"]
    series[:, :, 3] += 1
    changed = np.abs(run(whole, {"series": series})["forecast"] - before).max(axis=(0, 1)) > 1e-4
    assert changed.tolist() == [column == 3 for column in range(len(task.arguments["columns"]))]


def test_an_epoch_is_a_draw_of_train_windows_from_its_generator_alone() -> None:
    task = lstm.task(dataclasses.replace(SMALL, epoch_windows=50), None)
    first = list(task.batches(torch.Generator().manual_seed(3)))
    again = list(task.batches(torch.Generator().manual_seed(3)))
    other = list(task.batches(torch.Generator().manual_seed(4)))
    assert len(first) == task.steps_per_epoch == 4
    assert sum(len(look_back) for look_back, _ in first) == 50
    assert [tuple(tensor.shape[1:]) for tensor in first[0]] == [(24, 7), (12, 7)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_a_csv_of_ones_own_can_be_forecast(tmp_path: Path) -> None:
    hours = np.arange(400)
    lines = [f"{hour},{np.sin(hour / 4):.4f},{hour % 24}" for hour in hours]
    path = tmp_path / "own.csv"
    path.write_text("hour,wave,clock\n" + "\n".join(lines) + "\n", encoding="utf-8")
    recipe = dataclasses.replace(SMALL, data="csv", csv=str(path), sample=False)
    task, whole, step = serve(recipe)
    assert task.dataset == "own"
    assert whole.data.held_out["series"].shape == (80 - 12 + 1, 24, 2)
    assert [rows["series"].shape[1] for rows in whole.data.other_shapes] == [1, 17, 200]
    assert step.data.held_out["h"].shape == (69, 1, 2, 8)
    with pytest.raises(DataError, match="too short"):
        lstm.task(dataclasses.replace(recipe, horizon=48), None)


def test_the_test_split_is_in_neither_batches_nor_calibration() -> None:
    task, whole, _ = serve(dataclasses.replace(SMALL, epoch_windows=0))
    data = load_series_data("etth1", data_dir=None, sample=True)
    mean, std = data.mean_and_std()
    rows = {row.tobytes() for row in ((data.values - mean) / std)[: data.validation_start]}
    for look_back, ahead in task.batches(torch.Generator()):
        assert {row.numpy().tobytes() for row in (*look_back[:, -1], *ahead[:, -1])} <= rows
    raw = {row.tobytes() for row in data.values[: data.validation_start]}
    assert {row.tobytes() for row in whole.data.calibration["series"].reshape(-1, 7)} <= raw


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cell": "ltsm"}, "--cell: expected one of lstm, gru, rnn, got 'ltsm'"),
        ({"hidden": 0}, "--hidden: expected at least 1, got 0"),
        ({"context": 1}, "--context: expected at least 2, got 1"),
        ({"dropout": 1.0}, "--dropout: expected from 0 to below 1, got 1.0"),
        ({"csv": "a.csv"}, "--csv: expected nothing without --data csv, got 'a.csv'"),
        ({"epoch_windows": 3}, "--epoch-windows: expected 0 or at least a batch, got 3"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(SMALL, **change)


def test_the_named_recipes_are_there() -> None:
    assert {"quick", "cpu", "reference"} <= set(lstm.RECIPES)
    assert lstm.RECIPES["quick"].sample
