"""Multiply-adds of one run of an operator, from the shapes that it ran with.

The counts are the textbook ones, whatever way a kernel computes: a convolution is output numbers × weights
per output, a matrix product rows × columns × depth, attention two such products without regard to masks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from export.inspection.trace import Execution, Value

    Values = Sequence[Value | None]
    Count = Callable[[Execution], int]

MICROSOFT = "com.microsoft"


class UnknownShapeError(Exception):
    """A value's shape was neither seen nor inferred."""


class UnknownWorkError(Exception):
    """The operator's attributes ask for something that is not counted."""


def number_count(values: Values) -> int:
    """Numbers of a node's first input or output; 0 where it has none.

    Raises:
        UnknownShapeError: its shape is not known.
    """
    return _value(values, 0).count if values else 0


def _value(values: Values, index: int) -> Value:
    value = values[index] if len(values) > index else None
    if value is None:
        raise UnknownShapeError
    return value


def _optional(values: Values, index: int) -> tuple[int, ...] | None:
    value = values[index] if len(values) > index else None
    return None if value is None else value.shape


def _attribute(execution: Execution, name: str) -> int:
    attributes = execution.node.attribute if execution.node else ()
    return next((attribute.i for attribute in attributes if attribute.name == name), 0)


def _convolution(weights: int) -> Count:
    def count(execution: Execution) -> int:
        shape = _value(execution.inputs, weights).shape  # [out, in / groups, kernel, ...]
        return _value(execution.outputs, 0).count * math.prod(shape[1:])

    return count


def _transposed_convolution(execution: Execution) -> int:
    shape = _value(execution.inputs, 1).shape  # [in, out / groups, kernel, ...]
    return _value(execution.inputs, 0).count * math.prod(shape[1:])


def _matrix_product(execution: Execution) -> int:
    left = _value(execution.inputs, 0).shape
    depth = left[-2] if _attribute(execution, "transA") else left[-1]
    return _value(execution.outputs, 0).count * depth


def _recurrence(execution: Execution) -> int:
    """Input [time, batch, size]; weights [directions, gates · hidden, size], and likewise for the state."""
    time_and_batch = math.prod(_value(execution.inputs, 0).shape[:2])
    return time_and_batch * sum(_value(execution.inputs, index).count for index in (1, 2))


def _einsum(execution: Execution) -> int:
    """Of one or two operands: the product of all labels' sizes."""
    attributes = execution.node.attribute if execution.node else ()
    equation = next((a.s.decode() for a in attributes if a.name == "equation"), "...").replace(" ", "")
    operands = equation.partition("->")[0].split(",")
    if "." in equation or len(operands) > 2:  # noqa: PLR2004 - more have an order to be chosen
        raise UnknownWorkError
    shapes = [_value(execution.inputs, index).shape for index in range(len(operands))]
    sizes = {label: size for term, shape in zip(operands, shapes, strict=True)
             for label, size in zip(term, shape, strict=True)}  # fmt: skip
    return math.prod(sizes.values())


def _attention(execution: Execution) -> int:
    """Query, key and value are [batch, time, heads · size] or [batch, heads, time, size]."""
    past = _optional(execution.inputs, 4)
    keys = _value(execution.inputs, 1).shape[-2] + (past[-2] if past else 0)
    return (_value(execution.inputs, 0).count + _value(execution.outputs, 0).count) * keys


def _attention_with_projection(past: int) -> Count:
    """Input [batch, time, size], weights [size, query + key + value], past [2, batch, heads, time, size]."""

    def count(execution: Execution) -> int:
        batch, time, _ = _value(execution.inputs, 0).shape
        before = _optional(execution.inputs, past)
        keys = time + (before[3] if before else 0)
        return (
            batch * time * _value(execution.inputs, 1).count + 2 * _value(execution.outputs, 0).count * keys
        )

    return count


def _multi_head_attention(execution: Execution) -> int:
    """Key [batch, time, ...] or [batch, heads, time, size]; without one it is packed into the query."""
    key = _optional(execution.inputs, 1) or _value(execution.inputs, 0).shape
    past = _optional(execution.inputs, 6)
    heads_first = len(key) == 4  # noqa: PLR2004 - axes
    keys = key[2 if heads_first else 1] + (past[2] if past else 0)
    return 2 * _value(execution.outputs, 0).count * keys


def _group_query_attention(execution: Execution) -> int:
    """The present keys are [batch, heads, time, size]: with a shared buffer, all of it counts."""
    present = _optional(execution.outputs, 1)
    past, key = _optional(execution.inputs, 3), _optional(execution.inputs, 1)
    if not present and not key:
        raise UnknownShapeError
    keys = present[2] if present else (key or ())[1] + (past[2] if past else 0)
    return 2 * _value(execution.outputs, 0).count * keys


COUNTERS: Mapping[tuple[str, str], Count] = {
    **{("", name): _convolution(1) for name in ("Conv", "ConvInteger", "DeformConv")},
    **{(MICROSOFT, name): _convolution(1) for name in ("FusedConv", "NhwcFusedConv")},
    **{(domain, "QLinearConv"): _convolution(3) for domain in ("", MICROSOFT)},
    ("", "ConvTranspose"): _transposed_convolution,
    **{("", name): _matrix_product for name in ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul")},
    **{
        (MICROSOFT, name): _matrix_product
        for name in (
            "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "GemmFloat8", "MatMulBnb4", "MatMulFpQ4",
            "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits", "QGemm",
        )
    },
    **{("", name): _recurrence for name in ("LSTM", "GRU", "RNN")},
    (MICROSOFT, "DynamicQuantizeLSTM"): _recurrence,
    ("", "Einsum"): _einsum,
    ("", "Attention"): _attention,
    (MICROSOFT, "Attention"): _attention_with_projection(4),
    (MICROSOFT, "QAttention"): _attention_with_projection(8),
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
    (MICROSOFT, "GroupQueryAttention"): _group_query_attention,
}  # fmt: skip
