"""Everything that doesn't depend on the input becomes a constant, batch norms part of their convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_gemm_rule,
)

from export.passes import PassResult

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
BATCH_NORMS = (fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_gemm_rule)


class FoldConstants:
    """Fold, so that the quantizer sees all weights as such and what a convolution ends in.

    The quantizer's own preparation (`quant_pre_process`) gives up on attention masks, whose shapes it can't
    infer, and leaves files in the current folder when it does.
    """

    name: ClassVar[str] = "fold_constants"

    def check(self, model: ir.Model) -> str | None:  # noqa: ARG002 - any graph can be folded
        """See `export.passes.Pass`."""
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        before, outputs = len(model.graph), [value.name for value in model.graph.outputs]
        if model.functions:
            common.InlinePass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.IdentityEliminationPass()(model)
        _write_sums_as_additions(model.graph)
        fold_constants_ir(model, onnx_shape_inference=False, should_fold=_is_form_of_weights)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        rewriter.rewrite(model, BATCH_NORMS)
        common.RemoveUnusedNodesPass()(model)
        _separate_outputs(model.graph, outputs)
        common.TopologicalSortPass()(model)
        _name_nodes(model.graph)
        return PassResult(model, {"nodes folded": before - len(model.graph)})


def _is_form_of_weights(node: ir.Node) -> bool | None:
    """Fold these whatever their size, unless others read the same constant; None leaves it to onnxscript."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type not in FORMS or source is None or source.const_value is None or len(source.uses()) > 1:
        return None
    return all(value is None or value.const_value is not None for value in node.inputs)


def _write_sums_as_additions(graph: ir.Graph) -> None:
    """A Sum of two, as Caffe2's residual networks have it, is an Add, which has an integer kernel."""
    for node in graph:
        if (node.op_type, node.domain, len(node.inputs)) == ("Sum", "", 2):
            node.op_type = "Add"


def _separate_outputs(graph: ir.Graph, names: Sequence[str | None]) -> None:
    """Outputs of the names they had, where one value has become several of them or has another's name."""
    seen: set[ir.Value] = set()
    for index, (value, name) in enumerate(zip(tuple(graph.outputs), names, strict=True)):
        if value in seen or (value.is_graph_input() and value.name != name):
            copy = ir.node("Identity", [value], outputs=[ir.val(name, type=value.type, shape=value.shape)])
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        elif value.name != name:
            value.name = name
        seen.add(value)


def _name_nodes(graph: ir.Graph) -> None:
    """Give each node a name of its own: by names it is said which stay float."""
    names: set[str] = set()
    for node in graph:
        name = wanted = node.name or f"{node.op_type}_{node.outputs[0].name}"
        count = 0
        while name in names:
            count += 1
            name = f"{wanted}_{count}"
        node.name = name
        names.add(name)
