"""`config.pbtxt`: Triton's ModelConfig for an exported graph.

Fields as in `proto/model_config.proto`; only those are written that say something the defaults don't. What a
server has to know of a graph that texts are written with stands in `parameters`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import onnx_ir as ir
from google.protobuf import text_format

from export.errors import ExportError
from serve.pb import model_config_pb2
from train.family import Generation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LABELS = "labels.txt"
ENCODED_IMAGE = "encoded_image"
WRITTEN = (
    "name", "backend", "platform", "default_model_filename", "max_batch_size", "input", "output",
)  # fmt: skip
"""The fields of a config that an export decides."""
GENERATION = tuple(field.name for field in fields(Generation))
"""The parameters that an export decides; a server knows a generation model by them."""
MAX_NUM_SEQS = "max_num_seqs"


@dataclass(frozen=True)
class Served:
    """What the config says beyond the graph.

    Attributes:
        default: the file's name of the graph to serve.
        max_batch_size: rows that the server may put into one run; 0 where they would change each other's
            answers, or the graph's batch has a fixed size.
        labels: class names; the output whose last axis has as many numbers gets the label file.
        encoded_image: name of the input that takes files of images, which the server decodes.
        generation: how the server writes texts with the graph, whose own tensors clients then don't see; of
            `max_batch_size` only the 0 counts: one text at a time.
    """

    default: str
    max_batch_size: int
    labels: Sequence[str] = ()
    encoded_image: str | None = None
    generation: Generation | None = None


def model_config(name: str, model: ir.Model, served: Served) -> model_config_pb2.ModelConfig:
    """Describe a graph whose every tensor has the batch on its first axis.

    Raises:
        ExportError: a tensor's type has no counterpart, or there are labels but no output for them.
    """
    config = model_config_pb2.ModelConfig(
        name=name, backend="onnxruntime", default_model_filename=served.default
    )
    if served.generation:
        _set_generation(config, served.generation, batched=bool(served.max_batch_size))
        return config
    config.max_batch_size = served.max_batch_size
    first = 1 if served.max_batch_size else 0
    for value in model.graph.inputs:
        config.input.add(name=value.name, data_type=_data_type(value), dims=_dims(value)[first:])
    for value in model.graph.outputs:
        config.output.add(name=value.name, data_type=_data_type(value), dims=_dims(value)[first:])
    if served.labels:
        _set_label_file(config, len(served.labels))
    if served.encoded_image:
        _set_encoded_image(config, served.encoded_image)
    return config


def config_file(name: str, model: ir.Model, served: Served, before: model_config_pb2.ModelConfig) -> bytes:
    """The config as text protobuf, the same bytes for the same graph.

    Args:
        name: the entry's.
        model: the graph.
        served: what the graph doesn't say.
        before: the entry's config up to now; fields that no export writes are the user's, and stay.
    """
    config = model_config_pb2.ModelConfig()
    config.CopyFrom(before)
    for field in WRITTEN:
        config.ClearField(field)
    for parameter in (ENCODED_IMAGE, *GENERATION):
        config.parameters.pop(parameter, None)
    new = model_config(name, model, served)
    if is_generation(before):
        # Whether the entry streams is the user's to change, where there still is a choice.
        (new if served.generation else config).ClearField("model_transaction_policy")
    config.MergeFrom(new)
    return text_format.MessageToString(config, use_short_repeated_primitives=True).encode()


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """An entry's config; empty where there is none yet.

    Raises:
        ExportError: it is no ModelConfig.
    """
    return parse_config(path.read_bytes(), str(path)) if path.exists() else model_config_pb2.ModelConfig()


def parse_config(content: bytes, source: str) -> model_config_pb2.ModelConfig:
    """A config from its text; `source` is for the message.

    Raises:
        ExportError: it is no ModelConfig.
    """
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(content, config)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ExportError(f"{source}: not a ModelConfig ({error}); repair or remove it") from error
    return config


def is_generation(config: model_config_pb2.ModelConfig) -> bool:
    """Whether a server writes texts with the entry."""
    return "past_key_names" in config.parameters


def tensors(
    config: model_config_pb2.ModelConfig,
) -> list[tuple[str, model_config_pb2.DataType, tuple[int, ...]]]:
    """Name, type and axes of all inputs and outputs: what a client depends on."""
    inputs = [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in config.input]
    return inputs + [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in config.output]


def generation(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    """The cache's tensors and the context's length, which all versions share; empty where none is written."""
    return {name: config.parameters[name].string_value for name in GENERATION if name in config.parameters}


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
    """All axes, -1 where they are dynamic."""
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _set_label_file(config: model_config_pb2.ModelConfig, classes: int) -> None:
    for output in config.output:
        if list(output.dims)[-1:] == [classes]:
            output.label_filename = LABELS
            return
    found = ", ".join(f"{output.name!r} {list(output.dims)}" for output in config.output)
    raise ExportError(f"{classes} labels, but no output's last axis has as many numbers: {found}")


def _set_encoded_image(config: model_config_pb2.ModelConfig, name: str) -> None:
    """Declare the input as the content of an image file; see `serve.model.encoded_image`."""
    (image,) = (tensor for tensor in config.input if tensor.name == name)
    batch = [] if config.max_batch_size else image.dims[:1]
    image.data_type = model_config_pb2.TYPE_STRING
    image.ClearField("dims")
    image.dims.extend([*batch, 1])
    config.parameters[ENCODED_IMAGE].string_value = name


def _set_generation(config: model_config_pb2.ModelConfig, generation: Generation, *, batched: bool) -> None:
    """Have the server write texts with the graph, and stream them."""
    config.model_transaction_policy.decoupled = True
    for name, value in asdict(generation).items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        config.parameters[name].string_value = text
    if not batched:
        config.parameters[MAX_NUM_SEQS].string_value = "1"
