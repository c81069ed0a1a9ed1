"""Rows that stay matrices between products, and products cut into parts: the same answers, fewer nodes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from export.graph import check_graph, serialize
from export.int8.calibration import prepare
from export.passes.flat_rows import FlatRows
from export.passes.split_products import SplitProducts
from export.session import Session

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH = 8
ROWS = "float[batch, time, 8] x"
RESIDUAL = """
    h = MatMul(x, w)
    i = Add(h, b)
    j = Gelu(i)
    k = MatMul(j, w)
    l = Add(k, b)
    m = Add(x, l)
    n = LayerNormalization<axis = 2>(m, b, b)
"""
HEADS = """
    h = MatMul(x, wide)
    i = Add(h, long)
    q, k, v = Split<axis = 2, num_outputs = 3>(i)
    r = Reshape(q, to)
    s = Reshape(k, to)
    t = Reshape(v, to)
    u = Mul(r, s)
    y = Sub(u, t)
"""


def graph(inputs: str, nodes: str, output: str) -> ir.Model:
    """A graph in ONNX's text form, with constants drawn at random."""
    header = f'<ir_version: 8, opset_import: ["" : 20]> agraph ({inputs}) => ({output})'
    model = onnx.parser.parse_model(f"{header} {{ {nodes} }}")
    generator = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        name: generator.standard_normal(shape, np.float32)
        for name, shape in {
            "w": (WIDTH, WIDTH), "b": (WIDTH,), "wide": (WIDTH, 24), "long": (24,), "plane": (1, 1, WIDTH),
        }.items()
    }  # fmt: skip
    constants |= {
        "to": np.array([-1, 2, 4]),
        "zero": np.array([0, 0, 2, 4]),
        "uneven": np.array([4, 12, 8]),
        "time": np.array([1]),
    }
    used = {name for node in model.graph.node for name in node.input}
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    model.graph.initializer.extend(tensors)
    return ir.from_proto(model)


def answers(model: ir.Model, **inputs: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    data = {name: generator.standard_normal(shape, np.float32) for name, shape in inputs.items()}
    return [*Session(serialize(model)).run(data).values()]


def prepared_alike(model: ir.Model, *shapes: Mapping[str, tuple[int, ...]]) -> Counter[str]:
    """Prepare a graph, compare its answers to inputs of these shapes, and count its operators."""
    prepared = prepare(model.clone())
    check_graph(prepared)
    assert [value.name for value in prepared.graph.outputs] == [value.name for value in model.graph.outputs]
    for inputs in shapes:
        for before, after in zip(answers(model, **inputs), answers(prepared, **inputs), strict=True):
            assert after.shape == before.shape
            assert after == pytest.approx(before, abs=1e-5)
    return Counter(node.op_type for node in prepared.graph)


SHAPES = ({"x": (1, 5, 8)}, {"x": (3, 1, 8)}, {"x": (2, 7, 8)})


def test_a_residual_network_has_two_reshapes() -> None:
    model = graph(ROWS, RESIDUAL + "y = Identity(n)", "float[batch, time, 8] y")
    found = prepared_alike(model, *SHAPES)
    # Rows become a matrix once, for the product and the sum, and get their axes back once, at the end.
    assert found["Reshape"] == 2
    assert found["Gemm"] == 2
    assert "no matrix gets more axes" in str(FlatRows().check(model))


def test_axes_are_restored_for_what_looks_at_them() -> None:
    nodes = RESIDUAL + "o = ReduceMean<keepdims = 0>(n, time)\n p = Softmax<axis = 1>(l)\n y = Sub(p, m)"
    found = prepared_alike(
        graph(ROWS, nodes, "float[batch, time, 8] y, float[batch, 8] o, float[batch, time, 8] i"), *SHAPES
    )
    # The sum that the norm takes is restored too, and an output in the middle.
    assert found["Reshape"] == 1 + 4


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        ("float[batch, one, 8] z", (2, 1, 8)),
        ("float[other, time, 8] z", (1, 7, 8)),
        ("float[batch, time, 1] z", (2, 7, 1)),
        ("float[time, 8] z", (7, 8)),
    ],
)
def test_a_sum_of_other_axes_keeps_its_own(other: str, shape: tuple[int, ...]) -> None:
    nodes = RESIDUAL + "o = Add(l, z)\n y = Relu(o)"
    model = graph(f"{ROWS}, {other}", nodes, "float[a, c, 8] y")
    assert prepared_alike(model, {"x": (2, 7, 8), "z": shape})["Relu"] == 1


def test_a_constant_of_more_axes_keeps_the_sums() -> None:
    model = graph(ROWS, RESIDUAL + "y = Mul(n, plane)", "float[batch, time, 8] y")
    assert prepared_alike(model, *SHAPES)["Reshape"] == 2


def test_the_parts_of_a_product_become_products() -> None:
    found = prepared_alike(graph(ROWS, HEADS, "float[rows, 2, 4] y"), *SHAPES)
    assert (found["Gemm"], found["Split"]) == (3, 0)
    # One for the rows of all three products, one each for the heads.
    assert found["Reshape"] == 1 + 3


CUT = "h = MatMul(x, wide)\n a, c, d = Split<axis = 2>(h, uneven)\n q = Neg(a)\n y = Neg(d)\n"


@pytest.mark.parametrize(
    ("nodes", "parts"),
    [
        (CUT + "r = Neg(c)", 3),
        (CUT + "r = Add(h, h)", 0),
        (CUT + "r = MatMul(x, wide)", 0),
        ("h = MatMul(x, wide)\n q, r, y = Split<axis = 2>(h, uneven)", 0),
        ("h = MatMul(x, wide)\n i = Neg(h)\n q, r, y = Split<axis = 2>(i, uneven)", 0),
    ],
)
def test_only_what_nothing_else_reads_is_cut(nodes: str, parts: int) -> None:
    outputs = "float[batch, time, a] q, float[batch, time, c] r, float[batch, time, d] y"
    model = graph(ROWS, nodes, outputs)
    found = prepared_alike(model, *SHAPES)
    assert (found["MatMul"] == parts) is bool(parts)
    assert (found["Split"] == 0) is bool(parts)
    if parts:
        assert "no product with constant weights is cut" in str(SplitProducts().check(prepare(model)))


def test_a_reshape_that_copies_axes_keeps_them() -> None:
    nodes = RESIDUAL + "o = Reshape(n, zero)\n y = Transpose<perm = [0, 2, 1, 3]>(o)"
    assert prepared_alike(graph(ROWS, nodes, "float[batch, 2, time, 4] y"), *SHAPES)["Reshape"] == 3


def test_an_old_opset_is_left_alone() -> None:
    old = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 12}), ir_version=7)
    assert "needs opset 13, the graph has 12" in str(FlatRows().check(old))
