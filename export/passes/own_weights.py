"""A matrix that is multiplied as it is and transposed as two."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from export.passes import PassResult
from export.passes.weights import add_constant, array_of, find_product

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir


class OwnWeights:
    """Give the products that read a shared matrix the other way round than the first one does a copy.

    A scale per output column lies along one axis of the matrix for the ones and along the other axis for the
    others, and a tensor's scales have one axis.
    """

    name: ClassVar[str] = "own_weights"

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        if not any(True for _ in _other_way_round(model.graph)):
            return "no weight matrix is multiplied both as it is and transposed"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        copies: dict[ir.Value, ir.Value] = {}
        for node, weight in tuple(_other_way_round(model.graph)):
            if weight not in copies:
                name = f"{weight.name}.other_way_round"
                copies[weight] = add_constant(model.graph, name, array_of(weight))
            node.replace_input_with(1, copies[weight])
        return PassResult(model, {"weights copied": len(copies)})


def _other_way_round(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    first: dict[ir.Value, bool] = {}
    for node in graph:
        product = find_product(node)
        if product is None or product.weight is not node.inputs[1]:
            continue
        if first.setdefault(product.weight, product.transposed) != product.transposed:
            yield node, product.weight
