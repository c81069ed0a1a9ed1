"""How much memory the values between a graph's operators take."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from export.inspection.graph_file import nodes, subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

    from export.inspection.trace import Trace

# Their output is their first input, seen with another shape.
VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def peak_activations(graph: onnx.GraphProto, trace: Trace) -> int:
    """Most bytes of values that are alive at one time, those between the outermost graph's nodes.

    A value lives from the node that makes it to the last one that reads it, inputs and outputs all the time.
    Values of unknown shape count nothing.
    """
    buffers = _buffers(graph)
    outermost = {node.name for node in graph.node}
    order = [e.node for e in trace.executions if e.node is not None and e.node.name in outermost]
    last_read = {buffers.get(name, name): index for index, node in enumerate(order) for name in _reads(node)}
    stays = {buffers.get(value.name, value.name) for value in (*graph.input, *graph.output)}
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    size = {name: value.bytes for name, value in trace.values.items()}

    alive = Counter(
        {value.name: size.get(value.name, 0) for value in graph.input if value.name not in stored}
    )
    peak = alive.total()
    for index, node in enumerate(order):
        made = {name for name in node.output if name and buffers.get(name, name) == name} - stored
        alive.update({name: size.get(name, 0) for name in made})
        peak = max(peak, alive.total())
        for name in {buffers.get(name, name) for name in _reads(node)} | made:
            if name not in stays and last_read.get(name, index) <= index:
                alive.pop(name, None)
    return peak


def _buffers(graph: onnx.GraphProto) -> dict[str, str]:
    """Output of a view to the value whose memory it shares."""
    shared: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in VIEWS and node.input and node.output:
            shared[node.output[0]] = shared.get(node.input[0], node.input[0])
    return shared


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its inner graphs take from outside too."""
    yield from node.input
    for inner in subgraphs(node):
        yield from (value.name for value in inner.output)
        for held in nodes(inner):
            yield from held.input
