"""From a torch module to a checked ONNX graph."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset20

from export.attention import TRANSLATIONS, axes_by_parameter
from export.errors import ExportError
from export.explanation import explain, recorded_guards
from export.recurrent import RecurrentOperators, tidy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from train.family import ExampleInputs

LARGEST = (2 << 30) - 1
"""Bytes of a graph's file: protobuf's limit."""

OPSET = 20
"""Of the default domain: read by onnxruntime from 1.17 on, which is older than what 32-bit boards have."""


def export_graph(module: nn.Module, example: ExampleInputs) -> ir.Model:
    """Trace a serving module and translate it to ONNX.

    Args:
        module: in evaluation mode; takes `example.tensors` in order.
        example: input tensors, the names of their dynamic axes, and the output names.

    Returns:
        The graph in opset 20, weights inside, without the exporter's metadata: that holds stack traces with
        the paths of this machine, and took 0.2 MB, a fifth of a small network's file.

    Raises:
        ExportError: the module can't be traced or translated, or an axis that should be dynamic is constant.
    """
    guards: list[str] = []
    try:
        with _without_noise(), recorded_guards() as guards, RecurrentOperators():
            program = torch.onnx.export(
                module,
                tuple(example.tensors.values()),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=list(example.tensors),
                output_names=list(example.outputs),
                dynamic_shapes=axes_by_parameter(module, example),
                custom_translation_table={
                    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
                    **TRANSLATIONS,
                },
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(explain(error, guards)) from error
    assert program is not None
    model = program.model
    common.ClearMetadataAndDocStringPass()(model)
    tidy(model)
    _refuse_constant_axes(model, example)
    check_graph(model)
    return model


def check_graph(model: ir.Model) -> None:
    """Run the ONNX checker with shape inference.

    Raises:
        ExportError: the graph breaks the ONNX specification, or its weights are more than a file can hold.
    """
    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    if (size := sum(weight.nbytes for weight in weights if weight is not None)) > LARGEST:
        raise ExportError(
            f"the graph has {size / 1e9:.1f} GB of weights, and an .onnx file {LARGEST / 1e9:.1f} GB at "
            "most (protobuf's limit); weights in a file of their own aren't supported: export a smaller one"
        )
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the graph: {error}") from error


def serialize(model: ir.Model) -> bytes:
    """The content of the graph's `.onnx` file.

    Shapes of intermediate tensors are left out: every runtime infers them, and they took 6 % of a small file.
    """
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto.SerializeToString(deterministic=True)


def _adaptive_avg_pool2d(features: Any, output_size: Sequence[int]) -> Any:
    """Translate global average pooling to the operator of that name, which has an integer kernel.

    Left to itself the exporter decomposes it, for channels-last input, into a mean, a computed index and a
    gather: eleven nodes, none of which onnxruntime runs in int8. What pools to more than one pixel (AlexNet's
    does, and VGG's) is an AveragePool, where that divides the input evenly.
    """
    if all(size == 1 for size in output_size):
        return opset20.GlobalAveragePool(features)
    sizes = list(zip(features.shape[2:], output_size, strict=True))
    if any(not isinstance(size, int) or size % target for size, target in sizes):
        raise NotImplementedError(
            f"adaptive_avg_pool2d of {list(features.shape[2:])} to {list(output_size)}: "
            "only where that divides evenly"
        )
    kernel = [size // target for size, target in sizes]
    return opset20.AveragePool(features, kernel_shape=kernel, strides=kernel)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Silence what the exporter says about itself and about torch's own deprecated functions.

    Its failures are exceptions and pass. What it only warns of, a frozen axis or a wrong number, is measured
    afterwards.
    """
    logger = logging.getLogger("torch.onnx")  # says at each export that torchvision's operators are missing
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refuse_constant_axes(model: ir.Model, example: ExampleInputs) -> None:
    """Compare the graph's axes with the ones asked for: the exporter may freeze one without saying so."""
    asked = {name: dict(axes) for name, axes in example.dynamic_axes.items()}
    asked |= {name: {0: "batch"} for name in example.outputs}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        assert value.shape is not None
        for axis, name in asked.get(value.name, {}).items():
            if isinstance(size := value.shape[axis], int):
                raise ExportError(
                    f"tensor {value.name!r}: axis {axis} should be dynamic ({name!r}) but the exporter "
                    f"made it constant {size}; look in the module for a shape read as a Python number, a "
                    "loop over this axis or an operator that fixes it"
                )
