"""int8: fused without a float in between, small, as right as the original, for each target."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.graph import export_graph
from export.passes.clean_up import CleanUp
from export.passes.static_int8 import StaticInt8, Target
from export.quantization import Graphs, quantize
from export.session import Session, take
from train import mobilenet
from train.image_classification import PixelInput, example_inputs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.export.conftest import Network

ACTIVATIONS = {"x86": onnx.TensorProto.UINT8, "arm64": onnx.TensorProto.INT8}


@pytest.fixture(scope="session")
def quantized(network: Network) -> dict[Target, Graphs]:
    return {
        target: quantize(network.graph.clone(), network.data.calibration, target, "int8")
        for target in get_args(Target)
    }


def fused_operators(content: bytes, path: Path) -> Counter[str]:
    """What is left of a graph once onnxruntime has optimized it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    # INT8 activations are fused on ARM; this fuses them here too.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("target", get_args(Target))
def test_every_layer_runs_in_integers(
    quantized: dict[Target, Graphs], network: Network, target: Target, tmp_path: Path
) -> None:
    original = Counter(node.op_type for node in network.graph.graph)
    fused = fused_operators(quantized[target].content["int8"], tmp_path / "fused.onnx")
    assert fused["QLinearConv"] == original["Conv"] == 52
    assert fused["QLinearAdd"] == original["Add"]
    assert fused["QLinearGlobalAveragePool"] == fused["QGemm"] == 1
    # Pixels are normalized in float and rounded once; the logits come out of the last product in float.
    assert fused["QuantizeLinear"] == 1
    assert not {"DequantizeLinear", "Clip", "Conv", "Gemm", "QLinearMul"}.intersection(fused)


@pytest.mark.parametrize("target", get_args(Target))
def test_activations_are_of_the_type_that_the_target_multiplies(
    quantized: dict[Target, Graphs], target: Target
) -> None:
    model = onnx.load_from_string(quantized[target].content["int8"])
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zero_points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {types[name] for name in zero_points} == {ACTIVATIONS[target]}


@pytest.mark.parametrize("target", get_args(Target))
def test_int8_is_as_accurate(quantized: dict[Target, Graphs], network: Network, target: Target) -> None:
    sessions = {name: Session(content) for name, content in quantized[target].content.items()}
    held_out, targets = network.data.held_out, network.data.targets
    fp32, int8 = (
        network.serving.metric.score(sessions[name].run_in_batches(held_out), targets)
        for name in ("fp32", "int8")
    )
    assert fp32 > 0.5
    assert int8 >= fp32 - 0.015


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_row_has_the_same_answer_in_any_batch(
    quantized: dict[Target, Graphs], network: Network, precision: str
) -> None:
    session = Session(quantized["x86"].content[precision])
    rows = take(network.data.held_out, 0, 32)
    whole = session.run(rows)["logits"]
    alone = np.concatenate([session.run(take(rows, row, row + 1))["logits"] for row in range(32)])
    if precision == "int8":
        assert np.array_equal(whole, alone)
    else:
        assert whole == pytest.approx(alone, abs=1e-4)


def test_quantization_is_reproducible(quantized: dict[Target, Graphs], network: Network) -> None:
    again = quantize(network.graph.clone(), network.data.calibration, "x86", "int8")
    assert again.content == quantized["x86"].content


@pytest.mark.parametrize(
    ("recipe", "image"),
    [
        (mobilenet.RECIPES["quick"], {"classes": 10, "channels": 1, "image_size": 28}),
        (
            mobilenet.Recipe(width=1.0, stem="imagenet"),
            {"classes": 1000, "channels": 3, "image_size": 224},
        ),
    ],
    ids=["quick", "imagenet"],
)
def test_int8_file_is_about_a_third(recipe: mobilenet.Recipe, image: dict[str, int]) -> None:
    arguments = {
        **image,
        "width": recipe.width,
        "stem": recipe.stem,
        "dropout": recipe.dropout,
        "mean": [0.4, 0.5, 0.6][: image["channels"]],
        "std": [0.2, 0.3, 0.4][: image["channels"]],
    }
    torch.manual_seed(0)
    model = mobilenet.build_model(arguments).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)  # else no convolution has a bias, which a trained one always has
    inputs = example_inputs(arguments)
    graph = export_graph(PixelInput(model, arguments).eval(), inputs)
    calibration = {name: tensor.numpy() for name, tensor in inputs.tensors.items()}
    content = quantize(graph, calibration, "x86", "int8").content
    assert len(content["int8"]) <= 0.35 * len(content["fp32"])


def test_passes_say_why_they_do_not_apply(quantized: dict[Target, Graphs], network: Network) -> None:
    calibration = network.data.calibration
    int8 = quantized["x86"].served
    assert "isn't quantized" in str(CleanUp().check(network.graph))
    assert "already" in str(StaticInt8(calibration, "x86").check(int8))
    assert "no calibration rows for input 'image'" in str(StaticInt8({}, "x86").check(network.graph))
