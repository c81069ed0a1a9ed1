"""Fallbacks in their order, the default among several precisions, and what refuses an export."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.metric_gate import MetricError
from export.session import CPU
from export.settings import ExportSettings, GraphOptions
from export.targets import is_here, processor_target, provider, this_target
from export.variants import choose_default, make_variants
from train.classification import ACCURACY
from train.family import ExampleInputs, ServingData, ServingGraph

if TYPE_CHECKING:
    from pathlib import Path

    from export.variants import Variant, Variants

WIDTH = 64


class Perceptron(nn.Module):
    """Answers with its own biggest logit's class, so that as an original it is always right."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        logits: torch.Tensor = self.third(hidden)
        return logits


@torch.no_grad()
def perceptron(outlier: float = 1.0) -> ServingGraph:
    """With an outlier, one hidden number is so many times too large and weighs as much less in what follows.

    That changes nothing in float, but leaves the other numbers of its layer few of their 256 steps.
    """
    torch.manual_seed(0)
    module = Perceptron().eval()
    module.first.weight[0] *= outlier
    module.first.bias[0] *= outlier
    module.second.weight[:, 0] /= outlier
    rows = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    targets = module(torch.from_numpy(rows)).argmax(1).numpy()
    return ServingGraph(
        suffix="",
        module=module,
        example=ExampleInputs({"x": torch.from_numpy(rows[:2])}, {"x": {0: "batch"}}, ("logits",)),
        data=ServingData({"x": rows[:256]}, {"x": rows[256:]}, targets[256:]),
        metric=ACCURACY,
    )


def settings(tmp_path: Path, **changes: object) -> ExportSettings:
    return replace(ExportSettings(tmp_path / "models", "x86-vnni", tolerance=5.0), **changes)  # type: ignore[arg-type]  # any field


def made(graph: ServingGraph, asked: ExportSettings) -> tuple[Variants, list[str]]:
    said: list[str] = []
    return make_variants(graph, asked, said.append), said


def test_a_layer_that_int8_spoils_stays_float_and_it_is_said(tmp_path: Path) -> None:
    variants, said = made(perceptron(outlier=300.0), settings(tmp_path, precisions=("int8",)))
    int8 = variants.graphs["int8"]
    assert int8.findings.score >= 0.95
    assert int8.how.startswith("minmax calibration, 1 of 3 layers float: ")
    assert any(line.startswith("note: minmax calibration: int8 accuracy: ") for line in said)
    assert "find the layers that suffer most from int8" in said


def test_without_an_outlier_the_first_attempt_is_enough(tmp_path: Path) -> None:
    variants, said = made(perceptron(), settings(tmp_path, precisions=("int8",)))
    assert variants.graphs["int8"].how == "minmax calibration"
    assert not any(line.startswith("note") for line in said)


def never_good_enough() -> ServingGraph:
    """Its metric is zero for the original and not for anything rounded."""
    graph = perceptron()
    exact = graph.module(torch.from_numpy(graph.data.held_out["x"])).detach().numpy()
    off = replace(
        ACCURACY,
        name="off",
        score=lambda outputs, _: -float(np.abs(outputs["logits"] - exact).max() > 1e-4),
    )
    return replace(graph, metric=off)


def test_when_nothing_helps_fp32_is_left_and_it_is_said(tmp_path: Path) -> None:
    variants, said = made(never_good_enough(), settings(tmp_path, tolerance=0.0))
    assert variants.written == ("fp32",)
    assert "int8 off: -100.00 % against " in variants.skipped["int8"]
    tried = [line for line in said if line.startswith(("calibrate", "leave the worst"))]
    assert [line.split(" (")[-1].rstrip(")") for line in tried if line.startswith("calibrate")] == [
        "minmax", "entropy", "percentile",
    ]  # fmt: skip
    left = [line for line in tried if line.startswith("leave")]
    assert left == ["leave the worst 1 of 3 layers float", "leave the worst 2 of 3 layers float"]
    assert said.index(tried[1]) > said.index(tried[0])
    assert any(line.startswith("note: no int8: ") for line in said)


def test_a_precision_that_was_asked_for_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="int8 off"):
        made(never_good_enough(), settings(tmp_path, tolerance=0.0, precisions=("int8",)))


def test_several_precisions_the_first_is_the_default(tmp_path: Path) -> None:
    variants, _ = made(perceptron(), settings(tmp_path, precisions=("q8", "fp32", "fp16")))
    assert variants.written == ("q8", "fp32", "fp16")
    assert variants.default.precision == "q8"


def faster(variant: Variant, times: float) -> Variant:
    return replace(variant, latencies={batch: median / times for batch, median in variant.latencies.items()})


def test_the_fastest_is_the_default_where_that_can_be_measured(tmp_path: Path) -> None:
    variants, _ = made(perceptron(), settings(tmp_path, precisions=("fp32", "int8")))
    fp32 = variants.graphs["fp32"]
    int8 = replace(variants.graphs["int8"], latencies=fp32.latencies)
    here = settings(tmp_path, target=this_target())
    assert choose_default([fp32, faster(int8, 2)], ("int8",), here) == ("int8", ())
    default, notes = choose_default([fp32, faster(int8, 0.6)], ("int8",), here)
    assert default == "fp32"
    assert notes == (
        "int8 gains nothing in speed: 0.60 times as fast as fp32, where 1.1 would make it the default",
    )
    elsewhere = settings(tmp_path, target="arm64" if this_target() != "arm64" else "x86")
    default, notes = choose_default([fp32, faster(int8, 0.6)], ("int8",), elsewhere)
    assert default == "int8"
    assert "can't be measured here" in notes[0]


def test_an_axis_to_fix_that_is_not_there_is_refused(tmp_path: Path) -> None:
    asked = settings(tmp_path, options=GraphOptions(fixed={"time": 4}))
    with pytest.raises(ExportError, match=r"fix_shapes can't be applied: .*batch"):
        made(perceptron(), asked)


def test_a_graph_without_layers_cannot_be_int8(tmp_path: Path) -> None:
    graph = replace(perceptron(), module=nn.Sequential(nn.Softmax(dim=1)).eval())
    graph = replace(graph, metric=replace(ACCURACY, score=lambda outputs, _: float(len(outputs["logits"]))))
    with pytest.raises(ExportError, match=r"static_int8 can't be applied: .*Conv"):
        made(graph, settings(tmp_path, precisions=("int8",)))
    variants, _ = made(graph, settings(tmp_path))
    assert variants.written == ("fp32",)
    assert "static_int8 can't be applied" in variants.skipped["int8"]


def test_an_accelerator_that_runs_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.targets.usable_providers", lambda: ("CUDAExecutionProvider", CPU))
    assert this_target() == "cuda"
    assert is_here("cuda")
    assert is_here(processor_target())
    assert provider("cuda") == "CUDAExecutionProvider"
    assert provider("x86") == provider("openvino") == CPU
    monkeypatch.setattr("export.targets.usable_providers", lambda: (CPU,))
    assert this_target() == processor_target()
    assert provider("cuda") == CPU


class WithFeatures(nn.Module):
    """Answers features beside the logits; one input to them is large, and weighs nothing."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(16, 8)
        self.head = nn.Linear(16, 10)
        self.register_buffer("scale", torch.tensor([1e4] + [1.0] * 15))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(x), self.features(x * self.scale)


@torch.no_grad()
def test_an_output_that_the_metric_does_not_read_is_held_against_torch_too(tmp_path: Path) -> None:
    graph = perceptron()
    torch.manual_seed(0)
    module = WithFeatures().eval()
    module.features.weight[:, 0] = 0
    targets = module(torch.from_numpy(graph.data.held_out["x"]))[0].argmax(1).numpy()
    example = replace(graph.example, outputs=("logits", "features"))
    graph = replace(graph, module=module, example=example, data=replace(graph.data, targets=targets))
    variants, said = made(graph, settings(tmp_path))
    assert any(line.startswith("note: minmax calibration: int8 output 'features': ") for line in said)
    assert "1 of 2 layers float" in variants.graphs["int8"].how


def test_rows_that_are_all_alike_prove_nothing(tmp_path: Path) -> None:
    graph = perceptron()
    alike = {"x": np.zeros_like(graph.data.held_out["x"])}
    with pytest.raises(ExportError, match="the held-out rows are all alike"):
        made(replace(graph, data=replace(graph.data, held_out=alike)), settings(tmp_path, tolerance=100.0))
