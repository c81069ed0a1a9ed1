"""`config.pbtxt`: Triton's ModelConfig for an exported graph.

Fields as in `proto/model_config.proto`; only those are written that say something the defaults don't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from google.protobuf import text_format

from export.errors import ExportError
from serve.pb import model_config_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BATCH_SIZE = 8
LABELS = "labels.txt"


def model_config(name: str, model: ir.Model, labels: Sequence[str]) -> model_config_pb2.ModelConfig:
    """Describe a graph whose every tensor has the batch on its first axis.

    Args:
        name: the entry's name.
        model: the graph.
        labels: class names; the output whose last axis has as many numbers gets the label file.

    Raises:
        ExportError: a tensor's type has no counterpart, or there are labels but no output for them.
    """
    config = model_config_pb2.ModelConfig(name=name, backend="onnxruntime", max_batch_size=MAX_BATCH_SIZE)
    for value in model.graph.inputs:
        config.input.add(name=value.name, data_type=_data_type(value), dims=_dims(value))
    for value in model.graph.outputs:
        config.output.add(name=value.name, data_type=_data_type(value), dims=_dims(value))
    if labels:
        _set_label_file(config, len(labels))
    return config


def config_file(name: str, model: ir.Model, labels: Sequence[str]) -> bytes:
    """The config as text protobuf, the same bytes for the same graph."""
    return text_format.MessageToString(
        model_config(name, model, labels), use_short_repeated_primitives=True
    ).encode()


def labels_file(labels: Sequence[str]) -> bytes:
    """Class names in index order, one per line."""
    return "".join(f"{label}\n" for label in labels).encode()


def _data_type(value: ir.Value) -> str:
    names = {ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16", ir.DataType.DOUBLE: "FP64"}
    assert value.dtype is not None
    name = f"TYPE_{names.get(value.dtype, value.dtype.name)}"
    if name not in model_config_pb2.DataType.keys():  # noqa: SIM118 - an enum wrapper, not a mapping
        raise ExportError(f"tensor {value.name!r}: {value.dtype.name} is no type of Triton's ModelConfig")
    return name


def _dims(value: ir.Value) -> list[int]:
    """Axes after the batch axis, -1 where they are dynamic."""
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape[1:]]


def _set_label_file(config: model_config_pb2.ModelConfig, classes: int) -> None:
    for output in config.output:
        if list(output.dims)[-1:] == [classes]:
            output.label_filename = LABELS
            return
    found = ", ".join(f"{output.name!r} {list(output.dims)}" for output in config.output)
    raise ExportError(f"{classes} labels, but no output's last axis has as many numbers: {found}")
