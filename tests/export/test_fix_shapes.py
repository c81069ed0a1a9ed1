"""Constant shapes: the same answers, nothing left that computes a shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch

from export.graph import check_graph, export_graph, serialize
from export.passes.fix_shapes import FixShapes
from export.session import Session, take
from train import bert
from train.bert_classification import ServedClassifier
from train.sentence_classification import example_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

    from tests.export.conftest import Network

ARGUMENTS = {
    "classes": 3, "vocabulary": 64, "layers": 2, "heads": 2, "width": 32, "context": 16,
    "pooling": "mean", "norm": "pre", "dropout": 0.0, "guesses_words": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> ir.Model:
    torch.manual_seed(0)
    model = bert.build_model(ARGUMENTS).eval()
    return export_graph(ServedClassifier(cast("bert.Bert", model)), example_inputs(64, 16))


def tokens(batch: int, time: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 64, (batch, time))
    mask = np.ones_like(ids)
    mask[1:, time // 2 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def axes(model: ir.Model) -> dict[str, list[str]]:
    return {
        str(value.name): [str(size) for size in value.shape or ()]
        for value in (*model.graph.inputs, *model.graph.outputs)
    }


def unknown(model: ir.Model) -> list[str | None]:
    """Values with an axis of any size."""
    values = [output for node in model.graph.all_nodes() for output in node.outputs]
    return [v.name for v in values if v.shape is None or not all(isinstance(n, int) for n in v.shape)]


def test_all_axes_become_constants_and_shapes_are_computed_beforehand(text: ir.Model) -> None:
    rewrite = FixShapes({"batch": 2, "time": 10})
    assert rewrite.check(text) is None
    result = rewrite.apply(text.clone())
    check_graph(result.model)
    assert axes(result.model) == {
        "input_ids": ["2", "10"], "attention_mask": ["2", "10"], "logits": ["2", "3"],
    }  # fmt: skip
    assert unknown(result.model) == []
    assert "Shape" in {node.op_type for node in text.graph}
    assert not {"Shape", "Expand", "Range"} & {node.op_type for node in result.model.graph}
    assert result.changes == {
        "axes fixed": 5, "nodes folded": len(list(text.graph)) - len(list(result.model.graph)),
    }  # fmt: skip
    inputs = tokens(2, 10)
    fixed = Session(serialize(result.model))
    np.testing.assert_allclose(
        fixed.run(inputs)["logits"], Session(serialize(text.clone())).run(inputs)["logits"], atol=1e-6
    )
    with pytest.raises(Exception, match="invalid dimensions"):
        fixed.run(tokens(3, 10))


def test_an_axis_alone_leaves_the_other_dynamic(text: ir.Model) -> None:
    model = FixShapes({"time": 7}).apply(text.clone()).model
    check_graph(model)
    assert axes(model)["input_ids"] == ["batch", "7"]
    session, dynamic = Session(serialize(model)), Session(serialize(text.clone()))
    for batch in (1, 5):
        inputs = tokens(batch, 7)
        np.testing.assert_allclose(session.run(inputs)["logits"], dynamic.run(inputs)["logits"], atol=1e-6)


def test_images_keep_their_answers_at_a_fixed_batch(network: Network) -> None:
    result = FixShapes({"batch": 4}).apply(network.graph.clone())
    images = take(network.data.held_out, 0, 4)
    expected = Session(serialize(network.graph.clone())).run(images)["logits"]
    np.testing.assert_allclose(Session(serialize(result.model)).run(images)["logits"], expected, atol=1e-5)
    assert unknown(result.model) == []


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"height": 5}, "no input has an axis named 'height'; the graph's are 'batch', 'time'"),
        (
            {"batch": 1, "h": 5, "w": 5},
            "no input has an axis named 'h', 'w'; the graph's are 'batch', 'time'",
        ),
        ({"time": 0}, "axis 'time' can't be 0 long, expected 1 or more"),
        ({"batch": -1}, "axis 'batch' can't be -1 long, expected 1 or more"),
    ],
)
def test_what_cannot_be_fixed_says_why(text: ir.Model, sizes: dict[str, int], reason: str) -> None:
    assert FixShapes(sizes).check(text) == reason


def test_a_fixed_graph_has_no_axes_left(text: ir.Model) -> None:
    model = FixShapes({"batch": 1, "time": 4}).apply(text.clone()).model
    assert FixShapes({"batch": 1}).check(model) == (
        "no input has an axis named 'batch'; the graph's are none"
    )
