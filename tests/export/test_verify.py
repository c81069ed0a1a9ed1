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
from export.errors import ExportError
from export.graph import export_graph, serialize
from export.session import Session
from export.verify import check_batches, difference, verify
from train import mobilenet
from train.family import ExampleInputs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.export.conftest import Exported, Network
    from train.checkpoint import Checkpoint
    from train.family import ServingGraph


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
    status = main([str(checkpoint), "--to", str(exported.repository), "--tolerance", "0"])
    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith("error: int8 accuracy: ")
    assert "on 3500 held-out rows" in message
    assert "--tolerance" in message
    assert snapshot(exported.repository) == before


def test_refuses_a_graph_that_computes_something_else(network: Network) -> None:
    other = network.graph.clone()
    (bias,) = (value for value in other.graph.initializers.values() if list(value.shape or ()) == [10])
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + 0.1, name=bias.name)
    sessions = {"fp32": Session(serialize(other)), "int8": Session(serialize(network.graph))}
    with pytest.raises(ExportError, match="fp32 parity: output 'logits' of the graph is off by"):
        verify(network.serving, sessions, tolerance=0.005)


class Centered(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def test_refuses_a_graph_that_mixes_rows() -> None:
    inputs = ExampleInputs({"x": torch.ones(2, 3)}, {"x": {0: "batch"}}, ("y",))
    session = Session(serialize(export_graph(Centered().eval(), inputs)))
    rows = {"x": np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)}
    with pytest.raises(ExportError, match="the graph mixes the rows"):
        check_batches("int8", session, rows)


def test_refuses_outputs_that_are_not_numbers() -> None:
    good = np.ones((2, 3), np.float32)
    bad = good.copy()
    bad[0, 0] = np.nan
    assert not difference(bad, good).relative <= 1e-4


def test_difference_is_what_it_says() -> None:
    found = difference(np.array([[3.0, 4.5]], np.float32), np.array([[3.0, 4.0]], np.float32))
    assert found.max_abs == 0.5
    assert found.mean_abs == 0.25
    assert found.relative == 0.125
    assert found.cosine == pytest.approx(27 / (5 * np.hypot(3, 4.5)))
