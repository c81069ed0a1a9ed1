"""Ranges from rows: usable by each method, the same however many rows, refused where the rows are no good."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.int8.calibration import Method, Ranges, calibrate, prepare
from export.int8.sensitivity import layer_errors, sqnr_db
from export.int8.thresholds import Histogram, entropy, percentile
from export.passes.clean_up import CleanUp
from export.passes.static_int8 import SCHEMES, StaticInt8
from export.session import Session, take

if TYPE_CHECKING:
    from pathlib import Path

    from tests.export.conftest import Network


@pytest.fixture(scope="module")
def prepared(network: Network) -> ir.Model:
    return prepare(network.graph.clone())


@pytest.fixture(scope="module")
def ranges(prepared: ir.Model, network: Network) -> dict[Method, Ranges]:
    return {method: calibrate(prepared, network.data.calibration, method) for method in get_args(Method)}


def content(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@pytest.mark.parametrize("method", get_args(Method))
def test_each_method_leads_to_an_accurate_network(
    prepared: ir.Model, ranges: dict[Method, Ranges], network: Network, method: Method
) -> None:
    rounded = StaticInt8(ranges[method], SCHEMES["x86-vnni"]).apply(prepared).model
    int8 = CleanUp().apply(rounded).model
    fp32_score, int8_score = (
        network.serving.metric.score(
            Session(content(model)).run_in_batches(network.data.held_out), network.data.targets
        )
        for model in (network.graph, int8)
    )
    assert fp32_score > 0.5
    assert int8_score > fp32_score - 0.02


def test_ranges_lie_within_what_comes_and_cover_most_of_it(
    prepared: ir.Model, ranges: dict[Method, Ranges]
) -> None:
    assert {method: found.rows for method, found in ranges.items()} == dict.fromkeys(get_args(Method), 512)
    bounds = {method: found.bounds for method, found in ranges.items()}
    assert bounds["minmax"].keys() == bounds["entropy"].keys() == bounds["percentile"].keys()
    # After ReLU6 all numbers are between 0 and 6.
    clipped = [str(node.outputs[0].name) for node in prepared.graph if node.op_type == "Clip"]
    for found in bounds.values():
        assert all(low == 0 for low, _ in (found[name] for name in clipped))
        assert all(0 < high <= 6 for _, high in (found[name] for name in clipped))
    assert len(set(map(str, bounds.values()))) == 3


def test_calibration_gives_the_same_each_time_and_leaves_graph_and_folder_alone(
    prepared: ir.Model, ranges: dict[Method, Ranges], network: Network, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = content(prepared)
    assert calibrate(prepared, network.data.calibration, "minmax") == ranges["minmax"]
    assert content(prepared) == before
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_counted_batch_does_not_matter(
    prepared: ir.Model, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = take(network.data.calibration, 0, 20)
    whole = calibrate(prepared, rows, "percentile").bounds
    monkeypatch.setattr("export.int8.calibration.BYTES", 1 << 20)  # two rows at once
    parts = calibrate(prepared, rows, "percentile").bounds
    assert parts.keys() == whole.keys()
    for name, bounds in whole.items():
        assert parts[name] == pytest.approx(bounds, rel=1e-3, abs=1e-3)


def test_a_prepared_graph_computes_the_same(prepared: ir.Model, network: Network) -> None:
    rows = take(network.data.held_out, 0, 32)
    original, after = (Session(content(model)).run(rows)["logits"] for model in (network.graph, prepared))
    assert after == pytest.approx(original, abs=1e-5)
    names = [node.name for node in prepared.graph]
    assert None not in names
    assert len(set(names)) == len(names)


def test_batch_norms_and_constant_sums_are_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    for parameter in (norm.weight, norm.bias, norm.running_mean):
        assert parameter is not None
        nn.init.normal_(parameter)
    norm.training = True  # else the exporter folds it
    x, y = ir.val("x", ir.DataType.FLOAT, ["n", 3, 8, 8]), ir.val("y", ir.DataType.FLOAT, ["n", 4, 6, 6])
    constants = {
        "w": model[0].weight, "b": model[0].bias, "scale": norm.weight, "shift": norm.bias,
        "mean": norm.running_mean, "var": norm.running_var,
    }  # fmt: skip
    values = {}
    for name, tensor in constants.items():
        assert isinstance(tensor, torch.Tensor)
        array = tensor.detach().numpy()
        values[name] = ir.val(name, const_value=ir.tensor(array, name=name))
    conv = ir.node("Conv", [x, values["w"], values["b"]])
    normalized = ir.node(
        "BatchNormalization", [conv.outputs[0], *(values[name] for name in ("scale", "shift", "mean", "var"))]
    )
    relu = ir.node("Relu", [normalized.outputs[0]], outputs=[y])
    graph = ir.Graph(
        [x], [y], nodes=[conv, normalized, relu], initializers=list(values.values()), opset_imports={"": 20}
    )
    folded = prepare(ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=10))))
    assert [node.op_type for node in folded.graph] == ["Conv", "Relu"]
    norm.training = False
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels).detach().numpy()
    assert Session(content(folded)).run({"x": pixels.numpy()})["y"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (np.zeros_like, "in input 'image', got 0 in every place of all 512 rows"),
        (lambda rows: rows[:0], "expected rows, some hundreds at best, got none"),
    ],
    ids=["zeros", "none"],
)
def test_useless_pixels_are_refused(
    prepared: ir.Model, network: Network, change: object, complaint: str
) -> None:
    assert callable(change)
    rows = {name: change(array) for name, array in network.data.calibration.items()}
    with pytest.raises(ExportError, match=complaint):
        calibrate(prepared, rows, "minmax")


def linear(*, scale: float = 1) -> ir.Model:
    x, y = ir.val("x", ir.DataType.FLOAT, ["n", 4]), ir.val("y", ir.DataType.FLOAT, ["n", 3])
    weight = ir.val("w", const_value=ir.tensor(np.full((4, 3), scale, np.float32), name="w"))
    node = ir.node("MatMul", [x, weight], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 20})
    return prepare(ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=10))))


def test_numbers_that_are_none_are_refused() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    rows[3, 1], rows[7, 2] = np.nan, np.inf
    with pytest.raises(ExportError, match="finite numbers in input 'x', got 2 of 160 that are NaN or infin"):
        calibrate(linear(), {"x": rows}, "minmax")
    with pytest.raises(ExportError, match="expected rows for each of x, got none for x"):
        calibrate(linear(), {"image": rows}, "minmax")
    with pytest.raises(ExportError, match="value 'y' of the graph becomes NaN or infinite"):
        calibrate(linear(scale=1e38), {"x": np.full((40, 4), 100, np.float32) + rows[:1]}, "minmax")


def test_a_mask_of_ones_is_no_reason_to_refuse() -> None:
    ids, ones = np.arange(40).reshape(10, 4), np.ones((10, 4), np.int64)
    names = ("input_ids", "attention_mask")
    graph = ir.Graph(
        [ir.val(name, ir.DataType.INT64, ["n", 4]) for name in names], [], nodes=[], opset_imports={"": 20}
    )
    model = ir.Model(graph, ir_version=10)
    assert calibrate(model, dict(zip(names, (ids, ones), strict=True)), "minmax").bounds == {}
    with pytest.raises(ExportError, match="in input 'input_ids', got 1 in every place of all 10 rows"):
        calibrate(model, dict(zip(names, (ones, ones), strict=True)), "minmax")


def test_older_graphs_of_one_batch_size_are_brought_up_to_date() -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "w": generator.normal(size=(4, 3, 3, 3)).astype(np.float32) / 5,
        **{name: generator.uniform(0.5, 2, 4).astype(np.float32) for name in ("scale", "b", "mean", "var")},
    }
    # As Caffe2 wrote them: opset 9, constants among the inputs, Sum for Add, a batch of two alone.
    text = """
        <ir_version: 3, opset_import: ["" : 9]>
        old (float[2,3,8,8] x, float[4,3,3,3] w, float[4] scale, float[4] b, float[4] mean, float[4] var)
            => (float[2,4,6,6] y)
        {
            c = Conv(x, w)
            n = BatchNormalization(c, scale, b, mean, var)
            r = Relu(n)
            y = Sum(r, c)
        }"""
    old = onnx.parser.parse_model(text)
    old.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    prepared = prepare(ir.from_proto(old))
    assert {value.name for value in prepared.graph.inputs} == {"x"}
    assert [node.op_type for node in prepared.graph][-1] == "Add"
    rows = {"x": generator.normal(size=(5, 3, 8, 8)).astype(np.float32)}
    ranges = {method: calibrate(prepared, rows, method) for method in get_args(Method)}
    assert all(found.rows == 5 for found in ranges.values())
    expected = Session(old.SerializeToString()).run(take(rows, 0, 2))["y"]
    assert Session(content(prepared)).run(take(rows, 0, 2))["y"] == pytest.approx(expected, abs=1e-5)
    for scheme in SCHEMES.values():
        int8 = CleanUp().apply(StaticInt8(ranges["minmax"], scheme).apply(prepared).model).model
        assert sqnr_db(expected, Session(content(int8)).run(take(rows, 0, 2))["y"]) > 25
    (error,) = layer_errors(prepared, ranges["minmax"], SCHEMES["x86"], rows)
    assert error.operator == "Conv"
    assert 25 < error.sqnr_db < 150


def test_a_percentile_leaves_outliers_out_and_entropy_too() -> None:
    numbers = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    numbers[:3] = 100
    histogram = Histogram(float(numbers.min()), float(numbers.max()))
    for part in np.split(numbers, 10):
        histogram.add(part)
    assert histogram.counts.sum() == numbers.size
    low, high = percentile(histogram)
    assert low == pytest.approx(np.quantile(numbers, 5e-6), abs=0.05)
    assert high == pytest.approx(np.quantile(numbers, 1 - 5e-6), abs=0.05)
    low, high = entropy(histogram)
    assert low == pytest.approx(float(numbers.min()), abs=0.05)
    assert 3 < high < 20


def test_zeros_after_a_relu_do_not_decide_the_range() -> None:
    numbers = np.maximum(np.random.default_rng(0).normal(size=200_000) - 1, 0).astype(np.float32)
    histogram = Histogram(0.0, float(numbers.max()))
    histogram.add(numbers)
    low, high = entropy(histogram)
    assert low == 0
    assert high > 0.5 * numbers.max()


def test_a_value_that_never_changes_has_a_range() -> None:
    histogram = Histogram(2.0, 2.0)
    histogram.add(np.full(10, 2, np.float32))
    assert percentile(histogram) == (2.0, 2.0)
    assert entropy(histogram) == (2.0, 2.0)
