"""Dynamic int8 of LSTMs and products: small, integer, close; and with bounds, the same in any batch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from export.graph import check_graph, export_graph, serialize
from export.passes.bound_ranges import BoundRanges
from export.passes.dynamic_int8 import DynamicInt8
from export.session import Session, take
from train.data.series import load_series_data
from train.family import ExampleInputs

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, HORIZON = 64, 24


class Forecast(nn.Module):
    """The usual forecaster: the last output of an LSTM, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(7, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, HORIZON)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(series)
        forecast: torch.Tensor = self.head(outputs[:, -1])
        return forecast


class Deep(nn.Module):
    """Two layers in both directions that go on from a kept state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lstm = nn.LSTM(7, 20, 2, bidirectional=True)
        self.head = nn.Linear(40, 3, bias=False)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = (h.transpose(0, 1), c.transpose(0, 1))
        outputs, after = self.lstm(x.transpose(0, 1), before)
        return (self.head(outputs).transpose(0, 1), *(part.transpose(0, 1) for part in after))


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """96 hours of electricity transformers' sensors, z-scored."""
    data = load_series_data("etth1", data_dir=None, sample=True)
    mean, std = data.mean_and_std()
    values = ((data.values - mean) / std).astype(np.float32)
    return {"series": values[np.arange(0, 12800, 200)[:, None] + np.arange(96)]}


@pytest.fixture(scope="module")
def forecast() -> ir.Model:
    inputs = {"series": torch.zeros(2, 96, 7)}
    axes = {"series": {0: "batch", 1: "time"}}
    return export_graph(Forecast().eval(), ExampleInputs(inputs, axes, ("forecast",)))


@pytest.fixture(scope="module")
def deep() -> ir.Model:
    inputs = {"x": torch.zeros(2, 5, 7), "h": torch.zeros(2, 4, 20), "c": torch.zeros(2, 4, 20)}
    axes = {"x": {0: "batch", 1: "time"}, "h": {0: "batch"}, "c": {0: "batch"}}
    return export_graph(Deep().eval(), ExampleInputs(inputs, axes, ("y", "h_out", "c_out")))


def deep_rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = {
        "x": rng.standard_normal((16, 30, 7), dtype=np.float32),
        "h": rng.uniform(-1, 1, (16, 4, 20)).astype(np.float32),
        "c": 2 * rng.standard_normal((16, 4, 20), dtype=np.float32),
    }
    rows["x"] *= np.linspace(0.1, 3, 16, dtype=np.float32)[:, None, None]  # rows of very different ranges
    return rows


def quantize(graph: ir.Model, *, reduce_range: bool = False) -> ir.Model:
    step = DynamicInt8(reduce_range)
    assert step.check(graph) is None
    result = step.apply(graph.clone()).model
    check_graph(result)
    return result


def bound(graph: ir.Model, rows: dict[str, np.ndarray]) -> ir.Model:
    step = BoundRanges(rows)
    assert step.check(graph) is None
    result = step.apply(graph.clone()).model
    check_graph(result)
    return result


def operators(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


def by_itself(session: Session, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = len(next(iter(rows.values())))
    parts = [session.run(take(rows, row, row + 1)) for row in range(count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}


def test_lstm_and_head_are_integer_and_a_third_of_the_size(forecast: ir.Model, tmp_path: Path) -> None:
    result = DynamicInt8().apply(forecast.clone())
    assert result.changes == {"LSTM to int8": 1, "Gemm to int8": 1}
    found = operators(result.model)
    assert found["DynamicQuantizeLSTM"] == found["MatMulInteger"] == 1
    assert not {"LSTM", "Gemm", "MatMul"}.intersection(found)
    (lstm,) = [node for node in result.model.graph if node.op_type == "DynamicQuantizeLSTM"]
    assert [value.dtype for value in lstm.inputs[1:3] if value] == [ir.DataType.INT8] * 2
    content = serialize(result.model)
    assert len(content) < 0.3 * len(serialize(forecast))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert fused == ["Transpose", "DynamicQuantizeLSTM", "Squeeze", "Gather", "DynamicQuantizeMatMul"]


@pytest.mark.parametrize("reduce_range", [False, True])
def test_the_answer_stays_close(
    forecast: ir.Model, rows: dict[str, np.ndarray], *, reduce_range: bool
) -> None:
    graph = quantize(forecast, reduce_range=reduce_range)
    weights = [value.const_value for value in graph.graph.initializers.values() if value.const_value]
    largest = max(np.abs(weight.numpy()).max() for weight in weights if weight.dtype == ir.DataType.INT8)
    assert largest == (63 if reduce_range else 127)
    wanted = Session(serialize(forecast)).run(rows)["forecast"]
    off = np.abs(Session(serialize(graph)).run(rows)["forecast"] - wanted)
    assert 0 < off.max() < 0.05 * np.abs(wanted).max()
    series = {"series": rows["series"][:3, :40]}  # another length
    wanted = Session(serialize(forecast)).run(series)["forecast"]
    np.testing.assert_allclose(Session(serialize(graph)).run(series)["forecast"], wanted, atol=0.02)


def test_states_layers_and_directions_stay_close(deep: ir.Model) -> None:
    graph = quantize(deep)
    assert operators(graph)["DynamicQuantizeLSTM"] == 2
    assert tuple(value.name for value in graph.graph.outputs) == ("y", "h_out", "c_out")
    wanted = Session(serialize(deep)).run(deep_rows())
    for name, found in Session(serialize(graph)).run(deep_rows()).items():
        assert 0 < np.abs(found - wanted[name]).max() < 0.05 * np.abs(wanted[name]).max()


PRODUCTS = """
<ir_version: 10, opset_import: ["": 20]>
products (float[batch, 8] x) => (float[batch, 4] plain, float[batch, 4] turned, float[batch, 4] scaled) {
    plain = MatMul(x, w)
    turned = Gemm<transB = 1>(x, v, bias)
    scaled = Gemm<alpha = 0.5>(x, w, bias)
}
"""


def products() -> ir.Model:
    model = ir.from_onnx_text(PRODUCTS)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (8, 4)), ("v", (4, 8)), ("bias", (4,))):
        (value,) = {v for node in model.graph for v in node.inputs if v is not None and v.name == name}
        value.const_value = ir.tensor(rng.standard_normal(shape, dtype=np.float32), name=name)
        model.graph.register_initializer(value)
    return model


def test_products_share_what_they_can() -> None:
    x = {"x": np.random.default_rng(1).standard_normal((5, 8), dtype=np.float32)}
    wanted = Session(serialize(products())).run(x)
    graph = quantize(products())
    found = operators(graph)
    assert found["DynamicQuantizeLinear"] == 1  # of the input that both read
    assert found["MatMulInteger"] == 2
    assert found["Gemm"] == 1  # its alpha has no place in an integer product
    for name, value in Session(serialize(graph)).run(x).items():
        np.testing.assert_allclose(value, wanted[name], atol=0.1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y = Conv(x, w)", "no LSTM, MatMul or Gemm with constant weights"),
        ("y = MatMul(x, x)", "no LSTM, MatMul or Gemm with constant weights"),
        ("y, h = GRU<hidden_size = 4>(x, w, r)", "a GRU has no integer kernel"),
        ("h, n = RNN<hidden_size = 4>(x, w, r)  y = Relu(h)", "a RNN has no integer kernel"),
        ("q, s, z = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, s, z)", "quantized already"),
    ],
)
def test_what_gains_nothing_is_refused(text: str, reason: str) -> None:
    header = '<ir_version: 10, opset_import: ["": 20]> g (float[a, b, c] x, float w, float r) => (float y) {'
    graph = ir.from_onnx_text(header + text + "}")
    assert reason in str(DynamicInt8().check(graph))
    assert BoundRanges({}).check(graph) is not None


def test_twice_is_refused(forecast: ir.Model, rows: dict[str, np.ndarray]) -> None:
    graph = quantize(forecast)
    assert DynamicInt8().check(graph) == BoundRanges(rows).check(graph) == "the graph is quantized already"
    assert BoundRanges({}).check(forecast) == "no calibration rows for input 'series'"


def test_without_bounds_a_row_depends_on_its_batch(forecast: ir.Model, rows: dict[str, np.ndarray]) -> None:
    session = Session(serialize(quantize(forecast)))
    together = session.run(rows)["forecast"]
    assert np.abs(together - by_itself(session, rows)["forecast"]).max() > 1e-3


def test_with_bounds_each_row_is_bit_equal_alone_and_among_others(
    forecast: ir.Model, rows: dict[str, np.ndarray]
) -> None:
    graph = bound(forecast, rows)
    wanted = Session(serialize(forecast)).run(rows)["forecast"]
    np.testing.assert_allclose(Session(serialize(graph)).run(rows)["forecast"], wanted, rtol=1e-5, atol=1e-6)
    session = Session(serialize(quantize(graph)))
    together = session.run(rows)["forecast"]
    assert np.array_equal(by_itself(session, rows)["forecast"], together)
    assert np.abs(together - wanted).max() < 0.05 * np.abs(wanted).max()
    # Of what no calibration row has shown, too.
    beyond = {"series": np.concatenate([rows["series"][:4], 30 * rows["series"][:4]])}
    beyond["series"] = beyond["series"][:, :17]
    assert np.array_equal(by_itself(session, beyond)["forecast"], session.run(beyond)["forecast"])


def test_bounds_hold_for_states_layers_and_directions(deep: ir.Model) -> None:
    rows = deep_rows()
    graph = bound(deep, rows)
    wanted = Session(serialize(deep)).run(rows)
    for name, value in Session(serialize(graph)).run(rows).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6)
    session = Session(serialize(quantize(graph)))
    rows["h"][0] = 5  # no state of an LSTM
    together = session.run(rows)
    for name, value in by_itself(session, rows).items():
        assert np.array_equal(value, together[name])
        assert np.abs(value[1:] - wanted[name][1:]).max() < 0.05 * np.abs(wanted[name]).max()
