"""Which precisions a network is exported in, by its kind and by what it will run on: one table.

Measured against fp32 at batch 1, on one thread of a server with VNNI: static int8 is twice as fast for
MobileNetV2, 3 times for ResNet-18 and a small BERT. An LSTM gains only from dynamic int8, a token generator
from few bytes per weight. Dynamic int8 of convolutions is always slower than fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from export.targets import Target

Precision = Literal["fp32", "int8", "int8_dynamic", "q8", "q4", "fp16"]
Kind = Literal["convolutional", "recurrent", "transformer", "decoder"]

PRECISIONS: Mapping[Kind, Mapping[Target, tuple[Precision, ...]]] = {
    # The first is what is served where it can't be measured here which is fastest. fp32 is always there too.
    "convolutional": {
        "x86-vnni": ("int8",),
        "x86": ("int8",),
        "arm64": ("int8",),
        "cuda": ("fp16", "int8"),
        "openvino": ("int8",),
    },
    "recurrent": {
        "x86-vnni": ("int8_dynamic",),
        "x86": ("int8_dynamic",),
        "arm64": ("int8_dynamic",),
        # Neither has an integer LSTM.
        "cuda": ("fp16",),
        "openvino": (),
    },
    # BERT, and GPT where it reads a whole text at once.
    "transformer": {
        "x86-vnni": ("int8",),
        "x86": ("int8",),
        "arm64": ("int8",),
        "cuda": ("fp16", "int8"),
        "openvino": ("int8",),
    },
    # GPT with a cache, token by token: what counts is how many bytes of weights are read.
    "decoder": {
        "x86-vnni": ("q4", "q8"),
        "x86": ("q4", "q8"),
        "arm64": ("q4", "q8"),
        "cuda": ("fp16", "q4"),
        "openvino": (),
    },
}

POINTS = 0.005
"""How much worse a metric in points of 100 may get: 0.5 points of accuracy."""
RELATIVE: Mapping[Precision, float] = {
    "fp32": 0.01, "int8": 0.01, "int8_dynamic": 0.01, "fp16": 0.01, "q8": 0.005, "q4": 0.02,
}  # fmt: skip
"""By what part an error or a perplexity may rise."""

RECURRENT = {"LSTM", "GRU", "RNN"}


def kind(model: ir.Model) -> Kind:
    """What a graph is, by its operators."""
    operators = {node.op_type for node in model.graph}
    if operators & RECURRENT:
        return "recurrent"
    if "GroupQueryAttention" in operators:
        return "decoder"
    return "convolutional" if "Conv" in operators else "transformer"


def tolerance(precision: Precision, *, relative: bool) -> float:
    """How much worse than PyTorch's a precision's metric may be, unless the command line says otherwise.

    Args:
        precision: of the graph.
        relative: whether the metric changes by a part of itself; see `train.family.Metric`.

    Returns:
        A difference of the metric, or a part of it.
    """
    return RELATIVE[precision] if relative else POINTS


def graph_file(precision: Precision) -> str:
    """The graph's name in the version folder, as Hugging Face's ONNX repositories name them."""
    return "model.onnx" if precision == "fp32" else f"model_{precision}.onnx"
