"""Weights in blocks: what is stored, what is computed from it, and what that costs a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.graph import check_graph, export_graph, serialize
from export.passes.weight_only import WeightOnly, pack, quantize_blocks
from export.session import Session, cycle, take
from tests.language_model import language_model
from train.gpt_serving import language_graphs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.family import ServingGraph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
BITS = (4, 8)


@pytest.fixture(scope="module", params=["plain", "decode"])
def serving(request: pytest.FixtureRequest) -> ServingGraph:
    model = language_model()
    plain, decode = language_graphs(model.network, model.fitted, model.test)
    return plain if request.param == "plain" else decode


@pytest.fixture(scope="module")
def graph(serving: ServingGraph) -> ir.Model:
    return export_graph(serving.module, serving.example)


def small_graph(
    nodes: list[onnx.NodeProto], weights: Mapping[str, np.ndarray], ids: int = FLOAT, depth: int = 64
) -> ir.Model:
    """From x [batch, depth], or of INT64 [batch], to y."""
    x = helper.make_tensor_value_info("x", ids, ["batch", depth] if ids == FLOAT else ["batch"])
    y = helper.make_tensor_value_info("y", FLOAT, ["batch", None])
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    proto = helper.make_graph(nodes, "small", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(proto, opset_imports=opsets, ir_version=10))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def dequantized(matrix: np.ndarray, bits: int, block: int = 32) -> np.ndarray:
    integers, scales, zero_points = quantize_blocks(matrix, bits, block)
    whole = (integers.astype(np.float32) - zero_points[..., None]) * scales[..., None]
    result: np.ndarray = whole.reshape(matrix.shape)
    return result


# The rounding


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [16, 32, 64])
def test_no_weight_is_far_off_and_on_average_less_than_by_plain_rounding(bits: int, block: int) -> None:
    matrix = normal(40, 128) * np.geomspace(1e-3, 1e3, 40, dtype=np.float32)[:, None] + normal(40, 1, seed=1)
    blocks = matrix.reshape(40, -1, block)
    spread = np.maximum(blocks.max(2), 0) - np.minimum(blocks.min(2), 0)
    step = (spread / (2**bits - 1))[..., None]
    plain = np.rint(blocks / step) * step  # of an exact zero point, which is better than any integer one
    off = np.abs(dequantized(matrix, bits, block).reshape(blocks.shape) - blocks)
    # The range is narrowed by 30 % at most, half of it on either side or all on one.
    assert (off <= 0.5 * step + 0.31 * spread[..., None]).all()
    squared, plain_squared = np.square(off).sum(2), np.square(plain - blocks).sum(2)
    assert (squared <= plain_squared * 1.3 + 1e-12).all()
    if bits == 4:
        assert (squared / plain_squared).mean() < 0.95


@pytest.mark.parametrize("bits", BITS)
def test_what_can_be_exact_is(bits: int) -> None:
    steps = np.arange(2**bits, dtype=np.float32)[None]
    matrix = np.concatenate([np.tile(steps, 256 // 2**bits), np.tile(-0.5 * steps, 256 // 2**bits)])
    assert np.allclose(dequantized(matrix, bits, 256), matrix, rtol=1e-5)
    assert np.array_equal(dequantized(np.zeros((3, 64), np.float32), bits), np.zeros((3, 64)))
    same = np.full((2, 32), -3.7, np.float32)
    assert np.allclose(dequantized(same, bits), same, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_four_bits_are_packed_two_to_a_byte(blocks: int) -> None:
    integers, scales, zero_points = quantize_blocks(normal(5, 16 * blocks), 4, 16)
    packed, same_scales, packed_zero_points = pack(integers, scales, zero_points, 4)
    assert packed.dtype == np.uint8
    assert packed.shape == (5, blocks, 8)
    assert np.array_equal(packed & 15, integers[..., ::2])
    assert np.array_equal(packed >> 4, integers[..., 1::2])
    assert packed_zero_points.shape == (5, (blocks + 1) // 2)
    assert np.array_equal(packed_zero_points & 15, zero_points[:, ::2])
    assert same_scales is scales


# The graph


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Gemm transB", "Transpose"])
@pytest.mark.parametrize("depth", [64, 96])
def test_a_product_is_that_of_the_rounded_weights(operator: str, bits: Any, depth: int) -> None:
    matrix, bias = normal(40, depth), normal(40)
    weights = {"w": matrix if operator in {"Gemm transB", "Transpose"} else np.ascontiguousarray(matrix.T)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if operator.startswith("Gemm"):
        weights["b"] = bias
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int(operator == "Gemm transB"))]
    elif operator == "Transpose":
        nodes = [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
    step = WeightOnly(bits, accuracy_level=0)
    model = small_graph(nodes, weights, depth=depth)
    assert step.check(model) is None
    result = step.apply(model)
    assert result.changes == {"products": 1, "embeddings": 0}
    assert [node.op_type for node in result.model.graph] == ["MatMulNBits"] + ["Add"] * ("b" in weights)
    check_graph(result.model)
    x = normal(7, depth, seed=2)
    expected = x @ dequantized(matrix, bits).T + (bias if "b" in weights else 0)
    assert np.allclose(Session(serialize(result.model)).run({"x": x})["y"], expected, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_an_embedding_and_the_output_layer_share_their_bytes(bits: Any) -> None:
    table = normal(50, 96)
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["rows"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "t"], ["y"]),
    ]
    result = WeightOnly(bits, accuracy_level=0).apply(small_graph(nodes, {"w": table}, INT64))
    assert result.changes == {"products": 1, "embeddings": 1}
    constants = result.model.graph.initializers
    assert sorted(constants) == ["w_quantized", "w_quantized_rows", "w_scales", "w_zero_points"]
    content = serialize(result.model)
    assert len(content) < table.size * bits / 8 + 50 * 3 * 5 + 1500
    ids = np.array([0, 49, 7])
    rounded = dequantized(table, bits)
    assert np.allclose(Session(content).run({"x": ids})["y"], rounded[ids] @ rounded.T, atol=1e-4)


def test_reasons_not_to_apply() -> None:
    product = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    shallow = small_graph(product, {"w": normal(40, 8)}, depth=40)
    assert str(WeightOnly(4).check(shallow)) == (
        "no weight matrix has a depth that is a multiple of 32, only [40]"
    )
    transposed = helper.make_node("Transpose", ["x"], ["w"], perm=[1, 0])
    variable = small_graph([transposed, *product], {})
    assert WeightOnly(4).check(variable) == "no MatMul or Gemm has a constant weight matrix"
    scaled = helper.make_node("Gemm", ["x", "w"], ["y"], alpha=2.0)
    assert WeightOnly(4).check(small_graph([scaled], {"w": normal(64, 8)})) is not None
    done = WeightOnly(8).apply(small_graph(product, {"w": normal(64, 8)})).model
    assert WeightOnly(4).check(done) == "the graph is quantized already"


def test_settings_are_checked() -> None:
    for settings in ({"bits": 2}, {"bits": 4, "block": 24}, {"bits": 4, "block": 8}):
        with pytest.raises(ExportError, match=r"weight_only: .* expected .*, got"):
            WeightOnly(**settings)  # type: ignore[arg-type]  # wrong on purpose


# A language model


@pytest.mark.parametrize(("bits", "allowed", "size"), [(4, 0.02, 0.2), (8, 0.005, 0.33)])
def test_the_perplexity_hardly_rises(
    serving: ServingGraph, graph: ir.Model, bits: Any, allowed: float, size: float
) -> None:
    result = WeightOnly(bits).apply(graph.clone())
    assert result.changes == {"products": 9, "embeddings": 2}
    content = serialize(result.model)
    weights = 4 * sum(weight.numel() for weight in serving.module.parameters())
    assert len(content) < size * weights + 30_000
    with torch.no_grad():
        tensors = (torch.from_numpy(serving.data.held_out[name]) for name in serving.example.tensors)
        answer = serving.module(*tensors)
    logits = answer if isinstance(answer, torch.Tensor) else answer[0]
    before = serving.metric.score({"logits": logits.numpy()}, serving.data.targets)
    outputs = Session(content).run_in_batches(serving.data.held_out)
    after = serving.metric.score(outputs, serving.data.targets)
    assert before < 20
    assert abs(after / before - 1) < allowed


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_rounded_each_by_itself(serving: ServingGraph, graph: ir.Model, bits: Any) -> None:
    session = Session(serialize(WeightOnly(bits, accuracy_level=4).apply(graph.clone()).model))
    inputs = cycle(serving.data.held_out, 32)
    together = session.run(inputs)
    for row in range(0, 32, 5):
        for name, values in session.run(take(inputs, row, row + 1)).items():
            assert np.abs(values[0] - together[name][row]).max() <= 1e-5 * np.abs(together[name]).max()
