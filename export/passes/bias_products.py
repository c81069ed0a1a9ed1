"""Matrix product and bias as one operator over all rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import PassResult
from export.passes.weights import MATRIX, Product, add_constant, array_of, find_product, is_constant

if TYPE_CHECKING:
    from collections.abc import Hashable

SHAPE_OF_PART = 15  # the opset from which Shape can leave the last axis out


class BiasProducts:
    """Write MatMul and the Add of a bias behind it as one Gemm, the axes before the last one flattened.

    In int8 the bias is then part of the integer sum, and onnxruntime doesn't pull the Add into its
    SkipLayerNormalization: eight of those took 1.10 ms of a post-norm BERT of 4 layers, where eight
    LayerNormalization and as many Add take 0.2 ms (128 tokens, one thread). A MatMul with the transposed
    embedding, as language models end in, becomes a Gemm that reads the embedding itself, so that both share
    one quantized table.
    """

    name: ClassVar[str] = "bias_products"

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        if (opset := model.opset_imports.get("", 0)) < SHAPE_OF_PART:
            return f"needs opset {SHAPE_OF_PART}, the graph has {opset}"
        if not any(_find(node) for node in model.graph):
            return "no product of an activation with constant weights is followed by a bias"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        writer = _Writer(model.graph)
        products = [biased for node in model.graph if (biased := _find(node))]
        for biased in products:
            writer.write(biased)
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)  # products further on share a shape that another one computes
        return PassResult(model, {"products with their bias": len(products)})


class Biased(NamedTuple):
    """A MatMul to rewrite.

    Attributes:
        node: the MatMul.
        product: what it multiplies.
        add: the Add of the bias; None without one.
        bias: FP32, as many numbers as the weights have columns.
    """

    node: ir.Node
    product: Product
    add: ir.Node | None
    bias: ir.Value | None


def _find(node: ir.Node) -> Biased | None:
    product = find_product(node)
    if node.op_type != "MatMul" or product is None:
        return None
    if product.rows.shape is None or len(product.rows.shape) < MATRIX:
        return None
    add, bias = _bias(node, product.matrix().shape[1])
    return Biased(node, product, add, bias) if bias or product.transposed else None


def _bias(node: ir.Node, outer: int) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    product = node.outputs[0]
    users = product.consumers()
    if len(users) != 1 or users[0].op_type != "Add" or product.is_graph_output():
        return None, None
    # An Add in a branch of an If may never run, and the sum of a value with itself has no bias.
    others = [value for value in users[0].inputs if value is not product]
    if users[0].graph is not node.graph or len(others) != 1 or not is_constant(others[0]):
        return None, None
    bias = others[0]
    shape = array_of(bias).shape
    fits = array_of(bias).size == outer and shape[-1:] == (outer,) and len(shape) <= len(product.shape or ())
    return (users[0], bias) if fits else (None, None)


class _Writer:
    """Puts the new nodes into a graph; products of rows of one shape share the nodes that compute it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._shapes: dict[Hashable, ir.Value] = {}
        self._constants: dict[tuple[int, ...], ir.Value] = {}

    def write(self, biased: Biased) -> None:
        """Replace the MatMul and its Add."""
        product, last = biased.product, biased.add or biased.node
        result, rows = last.outputs[0], product.rows
        name = biased.node.name or result.name
        assert rows.shape is not None
        inner, outer = product.matrix().shape
        flat = len(rows.shape) == MATRIX
        inputs = [rows if flat else self._reshape(last, rows, self._constant(-1, inner), f"{name}.rows")]
        inputs.append(product.weight)
        if biased.bias:
            # A copy of its own: rounded for one product, a shared bias would be wrong for another.
            inputs.append(add_constant(self._graph, f"{name}.bias", array_of(biased.bias).reshape(-1)))
        attributes = {"transB": 1} if product.transposed else {}
        gemm = ir.node("Gemm", inputs, attributes, name=name, outputs=[ir.val(f"{name}.product")])
        self._graph.insert_before(last, gemm)
        answer = gemm.outputs[0]
        if not flat:
            answer = self._reshape(last, answer, self._shape(last, rows, outer), f"{name}.reshaped")
        answer.type, answer.shape = result.type, result.shape
        if result.is_graph_output():
            result.name, answer.name = f"{result.name}.replaced", result.name
        result.replace_all_uses_with(answer, replace_graph_outputs=True)

    def _reshape(self, before: ir.Node, value: ir.Value, shape: ir.Value, name: str) -> ir.Value:
        node = ir.node("Reshape", [value, shape], name=name, outputs=[ir.val(f"{name}.value")])
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _shape(self, before: ir.Node, rows: ir.Value, outer: int) -> ir.Value:
        """The shape of `rows` with the last size replaced, as an INT64 value."""
        assert rows.shape is not None
        leading = tuple(rows.shape)[:-1]
        if all(isinstance(size, int) for size in leading[1:]):
            return self._constant(-1, *(int(str(size)) for size in leading[1:]), outer)
        sizes = tuple(size if isinstance(size, int) else size.value for size in leading)
        key: Hashable = sizes if None not in sizes else rows
        if key not in self._shapes:
            name = f"{rows.name}.leading"
            part = ir.node("Shape", [rows], {"start": 0, "end": -1}, name=name)
            part.outputs[0].name = f"{name}.value"
            self._graph.insert_before(before, part)
            self._shapes[key] = part.outputs[0]
        if (key, outer) not in self._shapes:
            name = f"{rows.name}.to_{outer}"
            whole = [self._shapes[key], self._constant(outer)]
            join = ir.node("Concat", whole, {"axis": 0}, name=name, outputs=[ir.val(f"{name}.value")])
            self._graph.insert_before(before, join)
            self._shapes[key, outer] = join.outputs[0]
        return self._shapes[key, outer]

    def _constant(self, *sizes: int) -> ir.Value:
        if sizes not in self._constants:
            name = "reshape_to_" + "_".join(map(str, sizes)).replace("-1", "any")
            self._constants[sizes] = add_constant(self._graph, name, np.array(sizes, np.int64))
        return self._constants[sizes]
