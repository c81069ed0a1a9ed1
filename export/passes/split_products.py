"""A product that is cut into parts as one product per part."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import PassResult
from export.passes.weights import Product, add_constant, array_of, find_product, is_constant

if TYPE_CHECKING:
    from collections.abc import Sequence


class SplitProducts:
    """Write Gemm or MatMul and the Split of its columns as one product per part, of a part of the weights.

    Transformers compute queries, keys and values in one product, which saves reads of the rows in FP32. In
    int8 the rows are a quarter as large, and cutting the result costs more: 128 rows of 256 take 75 us in
    three products, and 72 in one and 10 for the Split (one thread). Scales are per column: the numbers stay
    exactly as they are.
    """

    name: ClassVar[str] = "split_products"

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        if not any(_find(node) for node in model.graph):
            return "no product with constant weights is cut into parts right away"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        cuts = [cut for node in model.graph if (cut := _find(node))]
        for cut in cuts:
            _write(model.graph, cut)
        common.RemoveUnusedNodesPass()(model)
        return PassResult(model, {"products cut into parts": len(cuts)})


class Cut(NamedTuple):
    """A Split to leave out.

    Attributes:
        split: the node.
        product: the Gemm or MatMul whose result it cuts.
        constants: of the product, weights first, each with the axis of its columns.
        sizes: how many columns each part has.
    """

    split: ir.Node
    product: ir.Node
    constants: tuple[tuple[ir.Value, int], ...]
    sizes: tuple[int, ...]


def _find(split: ir.Node) -> Cut | None:
    whole = split.inputs[0] if split.op_type == "Split" and split.domain == "" else None
    node = whole.producer() if whole is not None else None
    product = find_product(node) if node is not None else None
    if whole is None or node is None or product is None or product.weight is not node.inputs[1]:
        return None
    axis = split.attributes.get_int("axis", 0)
    last = whole.shape is not None and axis in {-1, len(whole.shape) - 1}
    if not last or len(whole.uses()) > 1 or whole.is_graph_output():
        return None
    sizes = [part.shape[-1] if part.shape else None for part in split.outputs]
    constants = _constants(product, sum(size for size in sizes if isinstance(size, int)))
    numbers = tuple(size for size in sizes if isinstance(size, int))
    if (
        constants is None
        or len(numbers) < len(sizes)
        or any(part.is_graph_output() for part in split.outputs)
    ):
        return None
    return Cut(split, node, constants, numbers)


def _constants(product: Product, columns: int) -> tuple[tuple[ir.Value, int], ...] | None:
    """Weights and bias with their columns' axes; None where there aren't so many, or others use them too."""
    constants = [(product.weight, 0 if product.transposed else 1)]
    if product.bias is not None:
        if not is_constant(product.bias) or array_of(product.bias).ndim != 1:
            return None
        constants.append((product.bias, 0))
    if any(len(value.uses()) > 1 or array_of(value).shape[axis] != columns for value, axis in constants):
        return None
    return tuple(constants)


def _write(graph: ir.Graph, cut: Cut) -> None:
    pieces = [_pieces(graph, value, axis, cut.sizes) for value, axis in cut.constants]
    for index, part in enumerate(cut.split.outputs):
        inputs = [cut.product.inputs[0], *(of_constant[index] for of_constant in pieces)]
        name = f"{cut.product.name}.{index}"
        node = ir.node(cut.product.op_type, inputs, {**cut.product.attributes}, name=name)
        graph.insert_before(cut.split, node)
        new = node.outputs[0]
        new.name, new.type, new.shape = f"{part.name}.product", part.type, part.shape
        part.replace_all_uses_with(new)


def _pieces(graph: ir.Graph, value: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
    arrays = np.split(array_of(value), np.cumsum(sizes)[:-1], axis)
    return [
        add_constant(graph, f"{value.name}.{index}", np.ascontiguousarray(array))
        for index, array in enumerate(arrays)
    ]
