"""FP16: half the bytes, the same answers within 1e-2, each row by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.graph import check_graph, export_graph, serialize
from export.passes.float16 import Float16
from export.session import Session, rows, take
from tests.export.test_fix_shapes import ARGUMENTS, tokens
from tests.graphs import info
from train import bert
from train.bert_classification import ServedClassifier
from train.sentence_classification import example_inputs

if TYPE_CHECKING:
    from tests.export.conftest import Network


def converted(model: ir.Model, rewrite: Float16) -> ir.Model:
    assert rewrite.check(model) is None
    result = rewrite.apply(model.clone())
    check_graph(result.model)
    assert result.changes["FP16 constants"] > 0
    return result.model


def compare(model: ir.Model, inputs: dict[str, np.ndarray]) -> None:
    """The answers of the graph in FP16 beside its own, together and row by row."""
    content, half = serialize(model.clone()), serialize(converted(model, Float16()))
    assert len(half) < 0.6 * len(content)
    expected, session = Session(content).run(inputs)["logits"], Session(half)
    got = session.run(inputs)["logits"]
    assert got.dtype.name == "float32"
    np.testing.assert_allclose(got, expected, atol=1e-2 * np.abs(expected).max())
    assert not np.array_equal(got, expected)
    alone = [session.run(take(inputs, row, row + 1))["logits"] for row in range(rows(inputs))]
    np.testing.assert_allclose(np.concatenate(alone), got, atol=1e-5)


def test_images(network: Network) -> None:
    compare(network.graph, take(network.data.held_out, 0, 16))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_texts(norm: str) -> None:
    torch.manual_seed(0)
    model = bert.build_model({**ARGUMENTS, "norm": norm, "width": 64, "vocabulary": 500}).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    served = ServedClassifier(cast("bert.Bert", model))
    compare(export_graph(served, example_inputs(500, 16)), tokens(5, 12))


def test_inputs_and_outputs_become_half_precision_on_demand() -> None:
    model = converted(product(np.ones((4, 3))), Float16(keep_io=False))
    x = np.ones((2, 4), np.float16)
    assert Session(serialize(model)).run({"x": x})["y"].tolist() == [[4.0] * 3] * 2
    kept = converted(product(np.ones((4, 3))), Float16())
    assert [value.dtype for value in (*kept.graph.inputs, *kept.graph.outputs)] == [ir.DataType.FLOAT] * 2


def product(weight: np.ndarray) -> ir.Model:
    """y = x · weight, FP32 [4, 3]."""
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [info("x", ["batch", 4])],
        [info("y", ["batch", 3])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    opsets = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=9))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.full((4, 3), 7e4), "FP16 ends at 65504, the graph has larger constants: 'weight' up to 7e+04"),
        (np.full((4, 3), -1e6), "'weight' up to 1e+06"),
    ],
)
def test_weights_beyond_the_range_are_refused(weight: np.ndarray, reason: str) -> None:
    assert reason in str(Float16().check(product(weight)))


@pytest.mark.parametrize("number", [-np.inf, np.finfo(np.float32).min, -1e9])
def test_numbers_that_stand_for_infinity_are_not(number: float) -> None:
    weight = np.zeros((4, 3))
    weight[0] = number
    session = Session(serialize(converted(product(weight), Float16())))
    y = session.run({"x": np.array([[1.0, 0.5, 0, 0]], np.float32)})["y"]
    assert (y <= -65504).all()


def test_a_quantized_graph_is_left_alone() -> None:
    node = helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    made = helper.make_graph(
        [node], "q", [info("x", ["batch"], TensorProto.INT8)], [info("y", ["batch"])], [scale]
    )
    model = ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]))
    assert Float16().check(model) == "the graph is quantized already: it has DequantizeLinear"


def test_a_graph_in_half_precision_has_nothing_left_to_convert() -> None:
    model = converted(product(np.ones((4, 3))), Float16())
    assert Float16().check(model) == "the graph has no FP32 constants"
