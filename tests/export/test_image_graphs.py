"""Pixels of any size, and the best classes alone: in the graph, as training and clients would do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image, ImageOps

from export.graph import check_graph, serialize
from export.passes.any_size_pixels import AnySizePixels
from export.passes.fix_shapes import FixShapes
from export.passes.float16 import Float16
from export.passes.top_k import TopK
from export.session import Session, take
from tests.graphs import FLOAT, info

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.export.conftest import Network

ROWS = 200
SIZE = 28
SIZES = (
    (1, 1), (1, 9), (9, 1), (2, 1), (24, 90), (9, 14), (14, 9), (20, 17), (25, 24), (26, 26), (27, 27),
    (27, 28), (28, 27), (28, 29), (28, 60), (61, 28), (29, 29), (31, 33), (35, 50), (56, 56), (64, 63),
    (200, 29), (240, 321),
)  # fmt: skip


def graph(*shape: int | str, dtype: int = TensorProto.UINT8, opset: int = 20) -> ir.Model:
    """Gives its input back."""
    node = helper.make_node("Identity", ["image"], ["pixels"])
    tensors = [info("image", shape, dtype), info("pixels", shape, dtype)]
    made = helper.make_graph([node], "pixels", tensors[:1], tensors[1:])
    opsets = [helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=9))


def any_size(model: ir.Model) -> Session:
    rewrite = AnySizePixels("image")
    assert rewrite.check(model) is None
    result = rewrite.apply(model)
    assert result.changes == {"inputs of any size": 1}
    check_graph(result.model)
    return Session(serialize(result.model))


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def resized(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """UINT8 [n, h, w, channels] as files of another size would hold them."""
    made = [np.asarray(picture(image).resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(made).reshape(len(images), height, width, -1)


def as_in_training(images: Sequence[np.ndarray] | np.ndarray, size: int = SIZE) -> np.ndarray:
    """What `train.data.image_folder` makes of them."""
    fitted = [ImageOps.fit(picture(image), (size, size), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in fitted]).reshape(len(images), size, size, -1)


@pytest.fixture(scope="module")
def int8(network: Network, tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    folder = tmp_path_factory.mktemp("int8")
    (folder / "fp32.onnx").write_bytes(serialize(network.graph.clone()))
    quantize_static(
        folder / "fp32.onnx", folder / "int8.onnx", Rows(take(network.data.calibration, 0, 64)),
        quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return ir.from_proto(onnx.load(folder / "int8.onnx"))


class Rows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.batches = [rows]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.batches.pop() if self.batches else None


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_those_of_training(network: Network, channels: int) -> None:
    images = np.repeat(network.data.held_out["image"][:8], channels, axis=3)
    session = any_size(graph("batch", SIZE, SIZE, channels))
    for size in SIZES:
        sent = resized(images, *size)
        got = session.run({"image": sent})["pixels"]
        differences = np.abs(got.astype(int) - as_in_training(sent))
        # Reducing, the filter ends at the crop; of one pixel less and an odd rest it is 1/14 wider.
        assert differences.mean() < (1.5 if size == (27, 28) else 0.6), size
        if min(size) < SIZE - 2:
            assert differences.max() <= 1, size


def test_noise_keeps_its_place() -> None:
    """Half a pixel of displacement would change noise by a third of its range."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 75, 100, 3), dtype=np.uint8)
    got = any_size(graph("batch", 50, 50, 3)).run({"image": noise})["pixels"]
    assert np.abs(got.astype(int) - as_in_training(noise, 50)).mean() < 2


def test_answers_are_those_of_the_training_pipeline(network: Network) -> None:
    session = any_size(network.graph.clone())
    original = Session(serialize(network.graph.clone()))
    images = network.data.held_out["image"][:ROWS]
    same = []
    for start in range(0, ROWS, 10):
        sent = resized(images[start : start + 10], *SIZES[start // 10 % len(SIZES)])
        expected = original.run({"image": as_in_training(sent)})["logits"].argmax(1)
        same += list(session.run({"image": sent})["logits"].argmax(1) == expected)
    assert len(same) == ROWS
    assert np.mean(same) >= 0.99


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_graph_behind_gets_the_pixels_and_nothing_else_changes(
    network: Network, int8: ir.Model, precision: str
) -> None:
    model = {"fp32": network.graph, "int8": int8}[precision].clone()
    original, session = Session(serialize(model.clone())), any_size(model)
    pixels = any_size(graph("batch", SIZE, SIZE, 1))
    for size in SIZES:
        sent = {"image": resized(network.data.held_out["image"][:4], *size)}
        expected = original.run({"image": pixels.run(sent)["pixels"]})["logits"]
        assert np.array_equal(session.run(sent)["logits"], expected)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_pixels_of_the_graphs_own_size_go_through_unchanged(
    network: Network, int8: ir.Model, precision: str
) -> None:
    model = {"fp32": network.graph, "int8": int8}[precision].clone()
    images = take(network.data.held_out, 0, 16)
    before = Session(serialize(model.clone())).run(images)["logits"]
    assert np.array_equal(any_size(model).run(images)["logits"], before)


def test_an_image_without_pixels_is_an_error_and_no_crash() -> None:
    session = any_size(graph("batch", SIZE, SIZE, 3))
    for shape in ((1, 0, 5, 3), (1, 5, 0, 3), (1, 0, 0, 3)):
        with pytest.raises(Exception, match="zero"):
            session.run({"image": np.zeros(shape, np.uint8)})
    assert session.run({"image": np.zeros((0, 5, 9, 3), np.uint8)})["pixels"].shape == (0, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph("batch", 28, 28, 3, dtype=FLOAT), "is FLOAT"),
        (graph("batch", 28, 30, 3), "is UINT8 [batch,28,30,3], expected UINT8 [batch, size, size"),
        (graph("batch", "height", "width", 3), "size fixed"),
        (graph("batch", 28, 28), "size fixed"),
        (graph("batch", 3, 3, 3), "4 or more"),
        (graph("batch", 28, 28, 3, opset=19), "opset 19, expected 20"),
    ],
)
def test_what_takes_no_square_of_pixels_is_left_alone(model: ir.Model, reason: str) -> None:
    assert reason in str(AnySizePixels("image").check(model))


def test_an_unknown_input_is_named_beside_those_there_are() -> None:
    found = AnySizePixels("pixels").check(graph("batch", 28, 28, 3))
    assert found == "the graph has no input 'pixels', it has 'image'"


def test_fixed_sizes_fold_all_but_the_resize(network: Network) -> None:
    model = AnySizePixels("image").apply(network.graph.clone()).model
    sent = resized(network.data.held_out["image"][:2], 33, 40)
    expected = Session(serialize(model.clone())).run({"image": sent})["logits"]
    fixed = FixShapes({"batch": 2, "height": 33, "width": 40}).apply(model.clone()).model
    added = {node.op_type for node in fixed.graph.all_nodes()} - {n.op_type for n in network.graph.graph}
    assert added <= {"Slice", "Pad", "Resize", "Reshape", "Constant"}
    assert np.array_equal(Session(serialize(fixed)).run({"image": sent})["logits"], expected)
    native = FixShapes({"height": SIZE, "width": SIZE}).apply(model).model
    assert not {"If", "Resize"} & {node.op_type for node in native.graph.all_nodes()}


def test_half_precision_comes_first(network: Network) -> None:
    model = AnySizePixels("image").apply(network.graph.clone()).model
    assert "If" in str(Float16().check(model))
    half = Float16().apply(network.graph.clone()).model
    sent = resized(network.data.held_out["image"][:4], 50, 41)
    got, expected = any_size(half).run({"image": sent}), Session(serialize(model)).run({"image": sent})
    np.testing.assert_allclose(got["logits"], expected["logits"], atol=0.05)


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_best_classes_come_in_falling_order(network: Network, k: int, keep_logits: bool) -> None:  # noqa: FBT001 - pytest passes parameters by position
    model = network.graph.clone()
    images = take(network.data.held_out, 0, 32)
    logits = Session(serialize(model.clone())).run(images)["logits"]
    rewrite = TopK(k, "logits", keep_logits=keep_logits)
    assert rewrite.check(model) is None
    result = rewrite.apply(model)
    check_graph(result.model)
    got = Session(serialize(result.model)).run(images)
    assert list(got) == ["logits"] * keep_logits + ["scores", "classes"]
    assert [array.dtype.name for array in got.values()][-2:] == ["float32", "int64"]
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert np.array_equal(got["classes"], order)
    exponents = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    probabilities = exponents / exponents.sum(1, keepdims=True)
    np.testing.assert_allclose(got["scores"], np.take_along_axis(probabilities, order, 1), rtol=1e-5)
    if keep_logits:
        assert np.array_equal(got["logits"], logits)


@pytest.mark.parametrize(
    ("model", "rewrite", "reason"),
    [
        (graph("batch", 10, dtype=FLOAT), TopK(11, "pixels"), "k is 11, expected 1 to 10"),
        (graph("batch", 10, dtype=FLOAT), TopK(0, "pixels"), "k is 0, expected 1 to 10"),
        (graph("batch", 10, dtype=FLOAT), TopK(1, "logits"), "no output 'logits', it has 'pixels'"),
        (graph("batch", 3, 10, dtype=FLOAT), TopK(1, "pixels"), "expected FLOAT [batch, classes]"),
        (graph("batch", "n", dtype=FLOAT), TopK(1, "pixels"), "expected FLOAT [batch, classes]"),
        (graph("batch", 10), TopK(1, "pixels"), "is UINT8"),
    ],
)
def test_what_gives_no_logits_is_left_alone(model: ir.Model, rewrite: TopK, reason: str) -> None:
    assert reason in str(rewrite.check(model))


def test_a_taken_name_is_a_reason(network: Network) -> None:
    model = network.graph.clone()
    model.graph.inputs[0].name = "classes"
    assert "classes" in str(TopK(1, "logits").check(model))
