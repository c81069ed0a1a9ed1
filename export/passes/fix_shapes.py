"""A graph of constant shapes, for processors that take no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from export.passes import PassResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class FixShapes:
    """Give symbolic axes constant lengths, and compute beforehand what the graph computes of them.

    NPUs and TensorRT compile a graph for the shapes that it has. An entry whose batch is fixed has no batch
    axis left for a server to fill: its config's `max_batch_size` is 0.

    Attributes:
        sizes: name of an axis ("batch", "time", "height") to its length.
    """

    name: ClassVar[str] = "fix_shapes"

    sizes: Mapping[str, int]

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        names = _axes(model.graph.inputs)
        if unknown := [name for name in self.sizes if name not in names]:
            known = ", ".join(map(repr, names)) or "none"
            return f"no input has an axis named {', '.join(map(repr, unknown))}; the graph's are {known}"
        for name, size in self.sizes.items():
            if size < 1:
                return f"axis {name!r} can't be {size} long, expected 1 or more"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        graph = model.graph
        before = _nodes(model)
        fixed = sum(self._fix(value) for value in (*graph.inputs, *graph.outputs))
        for node in graph.all_nodes():
            for value in node.outputs:
                self._fix(value)
        # Twice: what is folded, say the target of a Reshape, tells the next shapes.
        for _ in range(2):
            common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
            optimizer.fold_constants(model, onnx_shape_inference=True)
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, {"axes fixed": fixed, "nodes folded": before - _nodes(model)})

    def _fix(self, value: ir.Value) -> int:
        """Replace the axes of a value; how many."""
        if value.shape is None:
            return 0
        found = [axis for axis, size in enumerate(value.shape) if _name(size) in self.sizes]
        shape = [self.sizes.get(_name(size), size) for size in value.shape]
        value.shape = ir.Shape(shape)
        return len(found)


def _name(size: int | ir.SymbolicDim) -> str:
    """Of a symbolic axis; "" of others."""
    return "" if isinstance(size, int) or size.value is None else size.value


def _axes(values: Iterable[ir.Value]) -> list[str]:
    """Names of symbolic axes, each once, in the order in which they come."""
    names = dict.fromkeys(_name(size) for value in values for size in value.shape or ())
    return [name for name in names if name]


def _nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())
