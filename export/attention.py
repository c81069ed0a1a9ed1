"""Attention to a cache as the operator of onnxruntime that reads each row's only as far as it is filled.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from onnx.defs import OpSchema
from onnxscript import values

import train.decoding  # noqa: F401 - defines the operator that is translated here

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from train.family import ExampleInputs

DOMAIN = "com.microsoft"


def _operator() -> Any:
    """GroupQueryAttention with the arguments that are used here; onnx knows no operator of this domain."""
    inputs = dict.fromkeys(("query", "key", "value", "past_key", "past_value"), "T")
    inputs |= dict.fromkeys(("seqlens_k", "total_sequence_length"), "M")
    attributes = ("num_heads", "kv_num_heads")
    option, kinds = OpSchema.FormalParameterOption, OpSchema.AttrType
    schema = OpSchema(
        "GroupQueryAttention",
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(
                name, kind, param_option=option.Optional if name in {"key", "value"} else option.Single
            )
            for name, kind in inputs.items()
        ],
        outputs=[OpSchema.FormalParameter(name, "T") for name in ("output", "present_key", "present_value")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[OpSchema.Attribute(name, kinds.INT, required=True) for name in attributes],
    )
    return values.Op(values.Opset(DOMAIN, 1), schema.name, schema)


GROUP_QUERY_ATTENTION = _operator()


def cached_attention(packed: Any, past_key: Any, past_value: Any, last: Any, longest: Any) -> Any:
    """Translate `train.decoding.cached_attention`; queries, keys and values stay packed in one tensor."""
    heads = past_key.shape[1]
    return GROUP_QUERY_ATTENTION(
        packed, None, None, past_key, past_value, last, longest, num_heads=heads, kv_num_heads=heads
    )


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.onnxedge.cached_attention.default: cached_attention
}
"""For `custom_translation_table` of `torch.onnx.export`."""


def axes_by_parameter(module: nn.Module, example: ExampleInputs) -> tuple[Any, ...]:
    """The example's dynamic axes as `torch.export` takes them: those of `*args` in a tuple of their own."""
    axes = [dict(of_input) for of_input in example.dynamic_axes.values()]
    for index, parameter in enumerate(inspect.signature(module.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*axes[:index], tuple(axes[index:]))
    return tuple(axes)
