"""A classifier that answers its best classes instead of all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from export.passes import PassResult

SCORES, CLASSES = "scores", "classes"


@dataclass(frozen=True)
class TopK:
    """End in "scores" FP32 [batch, k], probabilities in falling order, and "classes" INT64 [batch, k].

    Softmax and TopK as nodes of the graph: a client gets k numbers instead of one per class, and needs no
    code of its own. Of classes as probable as each other the one of the lower index comes first.

    Attributes:
        k: how many classes.
        output: name of the graph output FP32 [batch, classes], the logits.
        keep_logits: whether they stay an output, the first.
    """

    name: ClassVar[str] = "top_k"

    k: int
    output: str
    keep_logits: bool = False

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == self.output), None)
        if logits is None:
            names = ", ".join(repr(value.name) for value in graph.outputs)
            return f"the graph has no output {self.output!r}, it has {names}"
        shape = logits.shape
        classes = shape[1] if shape is not None and len(shape) == 2 else None  # noqa: PLR2004 - batch, classes
        if logits.dtype != ir.DataType.FLOAT or not isinstance(classes, int):
            return f"output {self.output!r} is {logits.dtype} {shape}, expected FLOAT [batch, classes]"
        if not 1 <= self.k <= classes:
            return f"k is {self.k}, expected 1 to {classes}, the classes of output {self.output!r}"
        if taken := _names(graph) & {SCORES, CLASSES}:
            return f"the graph has tensors of the names to be given already: {', '.join(sorted(taken))}"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        graph = model.graph
        (place,) = (index for index, value in enumerate(graph.outputs) if value.name == self.output)
        logits = graph.outputs[place]
        assert logits.shape is not None
        k = ir.val(f"{self.output}.k", const_value=ir.tensor(np.array([self.k]), name=f"{self.output}.k"))
        graph.register_initializer(k)
        softmax = ir.node("Softmax", [logits], {"axis": -1}, outputs=[ir.val(f"{self.output}.probabilities")])
        shape = ir.Shape([logits.shape[0], self.k])
        scores = ir.val(SCORES, dtype=ir.DataType.FLOAT, shape=shape)
        classes = ir.val(CLASSES, dtype=ir.DataType.INT64, shape=shape)
        best = ir.node("TopK", [softmax.outputs[0], k], {"axis": -1}, outputs=[scores, classes])
        graph.extend((softmax, best))
        if not self.keep_logits:
            del graph.outputs[place]
            place -= 1
        graph.outputs[place + 1 : place + 1] = [scores, classes]
        return PassResult(model, {"classes answered": self.k})


def _names(graph: ir.Graph) -> set[str]:
    produced = (output.name for node in graph.all_nodes() for output in node.outputs)
    names = {*produced, *(value.name for value in graph.inputs), *graph.initializers}
    return {name for name in names if name}
