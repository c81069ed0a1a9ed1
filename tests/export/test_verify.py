"""The gates: each refuses what it should, says so with figures, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from export.__main__ import main
from export.errors import ExportError, GateError
from export.graph import export_graph, serialize
from export.metric_gate import lost
from export.original import run_original
from export.session import Session
from export.verify import check_likeness, check_parity, check_rows, compare, verify
from train import mobilenet
from train.family import ExampleInputs, Metric, ServingData, ServingGraph

if TYPE_CHECKING:
    from pathlib import Path

    from tests.export.conftest import Exported, Network
    from train.checkpoint import Checkpoint


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its inode and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def test_refuses_broken_calibration_and_leaves_the_repository_alone(
    checkpoint: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = mobilenet.serving_graphs

    def blind(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
        (graph,) = original(checkpoint, data_dir)
        zeros = {"image": np.zeros_like(graph.data.calibration["image"])}
        return (replace(graph, data=replace(graph.data, calibration=zeros)),)

    monkeypatch.setattr(mobilenet, "serving_graphs", blind)
    before = snapshot(exported.repository)
    status = main([str(checkpoint), "--to", str(exported.repository)])
    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith(
        "error: calibration: expected rows as clients send them in input 'image', got 0"
    )
    assert snapshot(exported.repository) == before


def test_refuses_int8_that_is_not_good_enough(
    checkpoint: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = mobilenet.serving_graphs

    def spoiled(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
        (graph,) = original(checkpoint, data_dir)
        exact = run_original(graph).outputs["logits"]
        worse = replace(
            graph.metric, score=lambda outputs, _: float(np.allclose(outputs["logits"], exact, atol=1e-4))
        )
        return (replace(graph, metric=worse),)

    monkeypatch.setattr(mobilenet, "serving_graphs", spoiled)
    before = snapshot(exported.repository)
    wanted = ("--precision", "int8", "--tolerance", "0.1")
    assert main([str(checkpoint), "--to", str(exported.repository), *wanted]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: int8 accuracy: ")
    assert "on 3500 held-out rows" in message
    assert "--tolerance" in message
    assert snapshot(exported.repository) == before


def test_refuses_a_graph_that_computes_something_else(network: Network) -> None:
    other = network.graph.clone()
    (bias,) = (value for value in other.graph.initializers.values() if list(value.shape or ()) == [10])
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + 0.1, name=bias.name)
    original = run_original(network.serving)
    with pytest.raises(ExportError, match="fp32 parity: output 'logits' of the graph is off by"):
        verify("fp32", Session(serialize(other)), network.serving, original, tolerance=0.005)


class Centered(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def test_refuses_a_graph_that_mixes_rows() -> None:
    inputs = ExampleInputs({"x": torch.ones(2, 3)}, {"x": {0: "batch"}}, ("y",))
    session = Session(serialize(export_graph(Centered().eval(), inputs)))
    rows = {"x": np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)}
    with pytest.raises(ExportError, match="the graph mixes the rows"):
        check_rows("fp32", session, rows)
    assert check_rows("fp32", session, rows, mixes_rows=True)["y"] > 0.1


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def halved(sizes: tuple[int, ...]) -> ServingGraph:
    """A graph with a dynamic second axis, judged on rows of these lengths, the held-out ones first."""
    arrays = [np.arange(4 * size, dtype=np.float32).reshape(4, size) for size in sizes]
    return ServingGraph(
        suffix="",
        module=Halved().eval(),
        example=ExampleInputs({"x": torch.ones(2, sizes[0])}, {"x": {0: "batch", 1: "time"}}, ("y",)),
        data=ServingData(
            {}, {"x": arrays[0]}, np.zeros(4), other_shapes=tuple({"x": array} for array in arrays[1:])
        ),
        metric=Metric("error", higher_is_better=False, score=lambda outputs, _: float(outputs["y"].mean())),
    )


def test_refuses_a_dynamic_axis_that_nothing_proves() -> None:
    with pytest.raises(
        ExportError, match=r"axis 1 \('time'\) is to be dynamic, but all rows have the size 5"
    ):
        run_original(halved((5,)))


def test_refuses_a_graph_that_is_wrong_at_another_length() -> None:
    right, other = halved((5, 3)), halved((5, 3))
    good = Session(serialize(export_graph(right.module, right.example)))
    assert verify("fp32", good, right, run_original(right), tolerance=0).other_shapes == {"y": 0.0}

    class Longer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2 * (x.shape[1] / 5)  # the same at length 5 alone

    wrong = Session(serialize(export_graph(Longer().eval(), other.example)))
    with pytest.raises(ExportError, match="fp32 parity"):
        verify("fp32", wrong, other, run_original(other), tolerance=0)


@pytest.mark.parametrize(
    ("relative", "higher", "before", "after", "expected"),
    [(False, True, 0.9, 0.8, 0.1), (True, False, 0.5, 0.6, 0.2), (True, False, 0.5, 0.4, -0.2)],
)
def test_what_is_lost_of_a_metric(
    *, relative: bool, higher: bool, before: float, after: float, expected: float
) -> None:
    metric = Metric("m", higher_is_better=higher, score=lambda *_: 0.0, relative=relative)
    assert lost(metric, before, after) == pytest.approx(expected)


def test_refuses_outputs_that_are_not_numbers() -> None:
    good = np.ones((2, 3), np.float32)
    bad = good.copy()
    bad[0, 0] = np.nan
    with pytest.raises(ExportError, match="off by inf"):
        check_parity(compare({"y": bad}, {"y": good}))
    # One NaN among many numbers leaves the cosine of the others at 1.
    with pytest.raises(GateError, match="fp16 output 'y' holds NaN or infinity"):
        check_likeness("fp16", compare({"y": bad}, {"y": good}))
