"""Graphs as others write them: shared weights, inner values as outputs, a Gemm's every attribute."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from export.graph import check_graph, serialize
from export.int8.calibration import Ranges, calibrate, prepare
from export.int8.quantizable import weighted_nodes
from export.passes.bound_ranges import BoundRanges
from export.passes.clean_up import CleanUp
from export.passes.dynamic_int8 import DynamicInt8
from export.passes.flatten_normalization import FlattenNormalization
from export.passes.own_weights import OwnWeights
from export.passes.static_int8 import SCHEMES, StaticInt8
from export.passes.weight_only import WeightOnly
from export.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Inputs = Mapping[str, np.ndarray]

WIDTH = 32
VECTORS = "float[batch, 32] x"
ROWS = "float[batch, time, 32] x"
PIXELS = "float[batch, 3, 8, 8] x"
CONV = "Conv<pads = [1, 1, 1, 1]>"


def normal(*shape: int) -> np.ndarray:
    """Columns and rows of very different sizes: scales of the wrong axis would show."""
    array = np.random.default_rng(len(shape)).standard_normal(shape, np.float32)
    return array * np.geomspace(0.1, 3, shape[-1], dtype=np.float32) if len(shape) == 2 else array


CONSTANTS = {
    "w": normal(WIDTH, WIDTH), "c": normal(WIDTH), "row": normal(1, WIDTH), "half": np.float32(0.5),
    "wide": normal(WIDTH, 64), "long": normal(64),
    "flat": np.array([-1, WIDTH]), "heads": np.array([-1, 2, 16]),
    "kernel": normal(3, 3, 3, 3), "three": normal(3), "table": normal(48, WIDTH),
    "integers": np.arange(48 * WIDTH).reshape(48, WIDTH).astype(np.int8),
    "scales": np.arange(1, 33, dtype=np.float32),
    "small": normal(WIDTH, 8),
    "input": normal(1, 64, 8), "recurrent": normal(1, 64, 16),
}  # fmt: skip
DATA = {
    VECTORS: {"x": normal(64, WIDTH)},
    ROWS: {"x": normal(64, 5, WIDTH)},
    PIXELS: {"x": normal(32, 3, 8, 8)},
}


def graph(inputs: str, nodes: str, outputs: str) -> ir.Model:
    """A graph in ONNX's text form, with the constants it names; outputs without sizes get theirs."""
    header = f'<ir_version: 8, opset_import: ["" : 20]> foreign ({inputs}) => ({outputs})'
    proto = onnx.parser.parse_model(f"{header} {{ {nodes} }}")
    for value in proto.graph.output:
        if not value.type.tensor_type.shape.dim:
            value.type.tensor_type.ClearField("shape")
    named = [name for name in CONSTANTS if re.search(rf"\b{name}\b", nodes)]
    tensors = [numpy_helper.from_array(np.asarray(CONSTANTS[name]), name) for name in named]
    proto.graph.initializer.extend(tensors)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def static(data: Inputs) -> Callable[[ir.Model], ir.Model]:
    def quantized(model: ir.Model) -> ir.Model:
        prepared = prepare(model)
        quantization = StaticInt8(calibrate(prepared, data, "minmax"), SCHEMES["x86-vnni"])
        assert quantization.check(prepared) is None
        return CleanUp().apply(quantization.apply(prepared).model).model

    return quantized


def dynamic(model: ir.Model) -> ir.Model:
    assert DynamicInt8().check(model) is None
    return DynamicInt8().apply(model).model


def weight_only(model: ir.Model) -> ir.Model:
    assert WeightOnly(8).check(model) is None
    return WeightOnly(8).apply(model).model


def alike(model: ir.Model, change: Callable[[ir.Model], ir.Model], data: Inputs, part: float) -> ir.Model:
    """Compare all answers before and after, by this part of the largest number."""
    before = Session(serialize(model)).run(data)
    changed = change(model.clone())
    check_graph(changed)
    after = Session(serialize(changed)).run(data)
    assert list(after) == list(before)
    for name, array in before.items():
        assert after[name] == pytest.approx(array, abs=part * float(np.abs(array).max()), rel=0), name
    return changed


@pytest.mark.parametrize(
    ("inputs", "nodes", "outputs"),
    [
        (PIXELS, f"h = {CONV}(x, kernel, three) k = {CONV}(h, kernel)", "h, k"),
        (PIXELS, f"h = {CONV}(x, kernel) r = Relu(h) k = {CONV}(r, kernel)", "r, k"),
        (PIXELS, f"h = {CONV}(x, kernel) r = Relu(h)", "h, r"),
        (PIXELS, f"h = {CONV}(x, kernel) r = Relu(h)", "r"),
        (PIXELS, f"h = {CONV}(x, kernel) r = Flatten(h)", "h, r"),
        (VECTORS, "h = Gemm(x, w, c) k = Gemm(h, w, c)", "h, k"),
    ],
)
def test_an_output_that_feeds_layers_is_float(inputs: str, nodes: str, outputs: str) -> None:
    typed = ", ".join(f"float {name}" for name in outputs.split(", "))
    changed = alike(graph(inputs, nodes, typed), static(DATA[inputs]), DATA[inputs], 0.15)
    assert any(node.op_type == "QuantizeLinear" for node in changed.graph)
    producers = [value.producer() for value in changed.graph.outputs]
    assert all(node is not None and node.op_type != "DequantizeLinear" for node in producers)


def test_rows_of_a_table_are_an_output_too() -> None:
    ids = {"i": np.arange(64).reshape(32, 2) % 48}
    model = graph("int64[b, t] i", "h = Gather(table, i) y = MatMul(h, w)", "float[b, t, 32] h, float y")
    alike(model, static(ids), ids, 0.03)


@pytest.mark.parametrize(
    "second",
    ["k = Gemm<transB = 1>(x, w)", "v = Transpose(w) k = MatMul(x, v)", "k = Gemm<transB = 1>(x, w, c)"],
)
@pytest.mark.parametrize("change", [static(DATA[VECTORS]), dynamic, weight_only])
def test_a_weight_is_multiplied_both_ways(second: str, change: Callable[[ir.Model], ir.Model]) -> None:
    model = graph(VECTORS, f"h = Gemm(x, w) {second}", "float h, float[batch, 32] k")
    alike(model, change, DATA[VECTORS], 0.03)
    assert OwnWeights().check(prepare(model)) == "no weight matrix is multiplied both as it is and transposed"


@pytest.mark.parametrize(
    "gemm",
    [
        "Gemm<alpha = 0.5, beta = 3.0>(x, w, c)",
        "Gemm<alpha = 0.5>(x, w)",
        "Gemm(x, w, half)",
        "Gemm(x, w, row)",
        "Gemm(x, w, x)",
    ],
)
def test_another_gemm_stays_float_in_static_int8(gemm: str) -> None:
    nodes, data = f"h = {gemm} k = Gemm(x, w, c)", {"x": DATA[VECTORS]["x"][:32]}
    model = graph("float[32, 32] x", nodes, "float h, float k")
    alike(model, static(data), data, 0.03)
    assert [node.outputs[0].name for node in weighted_nodes(prepare(model).graph)] == ["k"]


@pytest.mark.parametrize("change", [dynamic, weight_only])
@pytest.mark.parametrize(
    "gemm", ["Gemm<transA = 1>(x, w)", "Gemm<alpha = 2.0>(x, w)", "Gemm<beta = 2.0>(x, w, c)"]
)
def test_only_plain_products_are_rounded(gemm: str, change: Callable[[ir.Model], ir.Model]) -> None:
    data = {"x": normal(32, 32)}
    model = graph("float[32, 32] x", f"h = {gemm} k = MatMul(x, w)", "float h, float k")
    before = Session(serialize(model)).run(data)
    after = Session(serialize(change(model))).run(data)
    assert after["h"] == pytest.approx(before["h"], rel=1e-5, abs=1e-5)
    assert not np.array_equal(after["k"], before["k"])


@pytest.mark.parametrize("change", [prepare, dynamic, weight_only])
def test_a_transpose_may_leave_the_axes(change: Callable[[ir.Model], ir.Model]) -> None:
    nodes = "v = Transpose<perm = [0, 1]>(w) h = MatMul(x, v) i = MatMul(x, w) y = Add(h, i)"
    alike(graph(ROWS, nodes, "float[batch, time, 32] y"), change, DATA[ROWS], 0.02)


@pytest.mark.parametrize("change", [dynamic, weight_only])
def test_weights_that_a_client_sets_stay(change: Callable[[ir.Model], ir.Model]) -> None:
    model = graph(f"{VECTORS}, float[32, 32] w", "y = MatMul(x, w) z = MatMul(x, small)", "float y, float z")
    changed = alike(model, change, DATA[VECTORS], 0.03)
    products = [node for node in changed.graph if node.op_type == "MatMul"]
    assert [value.name for node in products for value in node.inputs if value] == ["x", "w"]


def test_a_table_is_read_twice_in_blocks() -> None:
    nodes = "h = Gather(table, i) k = Gather(table, j) s = Add(h, k) y = MatMul(s, w)"
    data = {"i": np.array([0, 47]), "j": np.array([1, 2])}
    alike(graph("int64[b] i, int64[b] j", nodes, "float[b, 32] y"), weight_only, data, 0.02)


@pytest.mark.parametrize("last", ["", "peepholes"])
def test_an_lstm_without_biases_is_bounded(last: str) -> None:
    data = {"x": normal(6, 3, 8)}
    nodes = f"Y, H, C = LSTM<hidden_size = 16>(x, input, recurrent{', ,' if last else ''})"
    model = graph("float[time, batch, 8] x", nodes, "float Y, float C")
    bound = BoundRanges({"x": normal(6, 64, 8)})
    assert bound.check(model) is None
    alike(model, lambda changed: dynamic(bound.apply(changed).model), data, 0.1)


IF = """h = MatMul(x, w)
    y = If(condition) <
        then_branch = left () => (float[batch, time, 32] p) { p = Add(h, c) },
        else_branch = right () => (float[batch, time, 32] q) { q = Neg(x) }
    >"""
SHARED_SHAPE = """h = MatMul(x, w)
    i = MatMul(x, w)
    j = Add(i, c)
    k = Softmax<axis = 1>(j)
    l = Add(h, c)
    y = Mul(l, k)"""


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("h = MatMul(x, w) y = Add(h, h)", "y"),
        ("h = MatMul(x, w) y = Add(h, c) z = Identity(y)", "y, z"),
        ("h = MatMul(x, w) i = Add(h, c) z = Identity(i) y = Identity(i)", "y, z"),
        ("h = MatMul(x, w) y = Add(h, c)", "y, h"),
        (SHARED_SHAPE, "y"),
        (IF, "y"),
    ],
)
def test_a_bias_joins_its_product_where_it_can(nodes: str, outputs: str) -> None:
    typed = ", ".join(f"float[batch, time, 32] {name}" for name in outputs.split(", "))
    branches = "condition" in nodes
    model = graph(f"{ROWS}{', bool condition' if branches else ''}", nodes, typed)
    data = {**DATA[ROWS], **({"condition": np.full((), 1, bool)} if branches else {})}
    changed = alike(model, prepare, data, 1e-5)
    names = [node.name for node in changed.graph]
    assert len(set(names)) == len(names)
    operators = [node.op_type for node in changed.graph]
    assert ("MatMul" in operators) != ("Gemm" in operators)


def test_normalized_pixels_that_are_answers_keep_their_axes() -> None:
    pixels = "float[batch, 8, 8, 3] x"
    nodes = "a = Mul(x, three) n = Sub(a, three) t = Neg(n)"
    data = {"x": normal(2, 8, 8, 3)}

    def flat(model: ir.Model) -> ir.Model:
        assert FlattenNormalization().check(model) is None
        return FlattenNormalization().apply(model).model

    alike(graph(pixels, nodes, "float[batch, 8, 8, 3] n, float[batch, 8, 8, 3] t"), flat, data, 1e-6)
    whole = graph(pixels, "n = Sub(x, three) t = Neg(n)", "float[batch, 8, 8, 3] n, float t")
    assert "no input of fixed height" in str(FlattenNormalization().check(whole))


def test_excluding_all_layers_is_refused() -> None:
    prepared = prepare(graph(VECTORS, "h = Gemm(x, w, c) r = Relu(h)", "float r"))
    names = frozenset(str(node.name) for node in weighted_nodes(prepared.graph))
    ranges = Ranges("minmax", 1, {"x": (-3.0, 3.0), "h": (-9.0, 9.0)})
    assert StaticInt8(ranges, SCHEMES["x86"], names).check(prepared) == "each layer with weights is excluded"
    assert StaticInt8(ranges, SCHEMES["x86"]).check(prepared) is None


CUT = "h = MatMul(x, wide) i = Add(h, long) a, d = Split<axis = -1, num_outputs = 2>(i) "
HEADS = "y = Reshape(a, heads) z = Reshape(d, heads)"


@pytest.mark.parametrize(
    ("inputs", "nodes", "outputs", "splits"),
    [
        (ROWS, CUT + HEADS, "y, z", 0),
        (ROWS, CUT + HEADS, "y, z, i", 1),
        (ROWS, CUT + HEADS, "y, z, d", 1),
        (VECTORS, CUT + HEADS, "y, z", 0),
        (VECTORS, CUT + HEADS, "y, z, i", 1),
        (VECTORS, CUT + HEADS, "y, z, d", 1),
    ],
)
def test_parts_and_wholes_that_are_answers_stay(inputs: str, nodes: str, outputs: str, splits: int) -> None:
    typed = ", ".join(f"float {name}" for name in outputs.split(", "))
    changed = alike(graph(inputs, nodes, typed), prepare, DATA[inputs], 1e-5)
    assert sum(node.op_type == "Split" for node in changed.graph) == splits


def test_a_matrix_that_is_an_answer_stays() -> None:
    nodes = "h = MatMul(x, w) i = Add(h, c) r = Reshape(i, flat) k = MatMul(r, w) y = Add(k, c)"
    alike(graph(ROWS, nodes, "float r, float y"), prepare, DATA[ROWS], 1e-5)


def test_a_table_with_a_scale_per_column_is_made_float_first() -> None:
    nodes = "t = DequantizeLinear<axis = 1>(integers, scales) y = Gather(t, i)"
    model = graph("int64[a, b] i", nodes, "float[a, b, 32] y")
    changed = alike(model, lambda same: CleanUp().apply(same).model, {"i": np.array([[0, 5, 47]])}, 1e-6)
    assert [node.op_type for node in changed.graph] == ["DequantizeLinear", "Gather"]
