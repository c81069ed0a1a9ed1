"""Recurrent layers as ONNX's own LSTM, GRU and RNN operators, of any batch size and any length.

Left to itself the exporter traces a recurrent layer step by step, or as an operator for the example's length
alone. Here each call of `torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu`, which all of `nn.LSTM`, `nn.GRU`,
`nn.RNN` and what derives from them end in, is traced as one operator per layer instead; no module is changed.
The operators: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html, onnx__RNN.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch.overrides import TorchFunctionMode

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    State = tuple[torch.Tensor, ...]

OPERATORS = ("LSTM", "GRU", "RNN")
WEIGHT_INPUTS = slice(1, 4)  # W, R and B of each
STATE_INPUTS = slice(5, 7)  # initial_h, and of an LSTM initial_c
PACKED = (
    "a packed sequence has no ONNX form; pad the rows to one length and pick each row's last output by its "
    "length"
)


@dataclass(frozen=True)
class Cell:
    """What sets one kind of recurrent layer apart.

    Attributes:
        operator: its ONNX operator.
        gates: PyTorch's gates in ONNX's order.
        attributes: of the operator; `activations` is for one direction.
    """

    operator: str
    gates: tuple[int, ...]
    attributes: Mapping[str, Any]


CELLS: Mapping[Callable[..., Any], Cell] = {
    # PyTorch has input, forget, cell, output; ONNX input, output, forget, cell.
    torch.lstm: Cell("LSTM", (0, 3, 1, 2), {}),
    # Reset, update, new; ONNX has update first. The new gate multiplies after the recurrent product and its
    # bias in PyTorch (and in cuDNN), before it in the paper: Cho et al., arXiv:1406.1078.
    torch.gru: Cell("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    torch.rnn_tanh: Cell("RNN", (0,), {"activations": ["Tanh"]}),
    torch.rnn_relu: Cell("RNN", (0,), {"activations": ["Relu"]}),
}


class RecurrentOperators(TorchFunctionMode):
    """While it is entered, in this thread, recurrent layers are traced as ONNX operators."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of each of its functions."""
        if func is torch._VF._pack_padded_sequence:  # noqa: SLF001 - what torch.nn.utils.rnn calls
            raise ExportError(PACKED)
        if cell := CELLS.get(func):
            return as_operators(cell, *args, **kwargs or {})
        return func(*args, **kwargs or {})


def as_operators(  # noqa: PLR0917 - torch.lstm's order of arguments
    cell: Cell,
    series: torch.Tensor,
    state: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    has_biases: bool,  # noqa: FBT001 - so here
    layers: int,
    dropout: float,
    training: bool,  # noqa: FBT001 - and here
    bidirectional: bool,  # noqa: FBT001 - and here
    batch_first: bool | None = None,  # noqa: FBT001 - and here
) -> tuple[torch.Tensor, ...]:
    """Stand in for `torch.lstm` and the like; same arguments and results.

    Raises:
        ExportError: the layer has what the operators don't.
    """
    if batch_first is None or not isinstance(weights, list | tuple):  # torch's other signature
        raise ExportError(PACKED)
    directions = 1 + bidirectional
    each = len(weights) // (layers * directions)  # weight_ih, weight_hh, bias_ih, bias_hh
    if each != 2 + 2 * has_biases:
        raise ExportError(f"{cell.operator}: proj_size has no ONNX form; project by a Linear after the layer")
    if training and dropout and layers > 1:
        raise ExportError(f"{cell.operator}: dropout between the layers is on; call eval() on the module")
    before = (state,) if isinstance(state, torch.Tensor) else tuple(state)
    outputs = series.transpose(0, 1) if batch_first else series
    after: list[State] = []
    for layer in range(layers):
        start = layer * directions
        of_layer = [weights[(start + d) * each : (start + d + 1) * each] for d in range(directions)]
        outputs, last = _layer(cell, outputs, of_layer, [kept[start : start + directions] for kept in before])
        after.append(last)
    kept = tuple(parts[0] if layers == 1 else torch.cat(parts) for parts in zip(*after, strict=True))
    return (outputs.transpose(0, 1) if batch_first else outputs, *kept)


def _layer(
    cell: Cell,
    series: torch.Tensor,
    weights: Sequence[Sequence[torch.Tensor]],
    state: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, State]:
    """One operator: FP [time, batch, features] to [time, batch, directions * hidden], and the state after."""
    directions, hidden = len(weights), weights[0][1].shape[1]
    time, batch, _ = series.shape
    inputs = [series, *_operator_weights(cell, weights), None, *state]
    attributes = {"hidden_size": hidden, **cell.attributes}
    if directions > 1:
        attributes["direction"] = "bidirectional"
        attributes |= {name: value * 2 for name, value in cell.attributes.items() if name == "activations"}
    kept = [(directions, batch, hidden)] * len(state)
    outputs, *last = torch.onnx.ops.symbolic_multi_out(
        cell.operator,
        inputs,
        attributes,
        dtypes=[series.dtype] * (1 + len(kept)),
        shapes=[(time, directions, batch, hidden), *kept],
    )
    flat = outputs.squeeze(1) if directions == 1 else outputs.transpose(1, 2).flatten(2)
    return flat, tuple(last)


def _operator_weights(cell: Cell, weights: Sequence[Sequence[torch.Tensor]]) -> Iterator[torch.Tensor | None]:
    """W [directions, gates * hidden, features], R [..., hidden] and B [directions, 2 * gates * hidden]."""

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        size = len(weight) // len(cell.gates)
        # Slices, not `chunk`: an operator with several outputs isn't folded into a constant.
        parts = [weight[gate * size : (gate + 1) * size] for gate in cell.gates]
        return torch.cat(parts) if len(parts) > 1 else weight

    for kind in (0, 1):
        yield torch.stack([reorder(direction[kind]) for direction in weights])
    has_biases = len(weights[0]) > 2  # noqa: PLR2004 - after the two products' weights
    biases = [torch.cat([reorder(bias) for bias in direction[2:]]) for direction in weights if has_biases]
    yield torch.stack(biases) if biases else None


def tidy(model: ir.Model) -> None:
    """Make the operators' weights initializers, and leave out an initial state of zeros, which is ONNX's own.

    The exporter's optimizer folds constants of up to 8192 numbers; above that the gates would be put in order
    at every run.
    """
    nodes = [node for node in model.graph if node.op_type in OPERATORS and not node.domain]
    if not nodes:
        return
    for node in nodes:
        for index in range(*STATE_INPUTS.indices(len(node.inputs))):
            if _is_zero(node.inputs[index]):
                node.replace_input_with(index, None)
    common.RemoveUnusedNodesPass()(model)
    weights = {value for node in nodes for value in node.inputs[WEIGHT_INPUTS] if value is not None}
    above = _producers(weights)
    optimizer.fold_constants(model, should_fold=lambda node: True if node in above else None)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _producers(values: set[ir.Value]) -> set[ir.Node]:
    """All nodes that the values are computed by."""
    found: set[ir.Node] = set()
    todo = list(values)
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [value for value in node.inputs if value is not None]
    return found


def _is_zero(value: ir.Value | None) -> bool:
    """Whether it is zeros of any shape, sliced or not."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in {"Expand", "Slice", "Gather", "Reshape", "Unsqueeze", "Squeeze", "Transpose"}:
            break
        value = node.inputs[0]
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and not constant.numpy().any()
