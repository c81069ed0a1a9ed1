"""What a model takes and gives: its config.pbtxt, completed from the graph and checked against it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from serve.errors import InvalidArgumentError, ModelLoadError
from serve.model.config_pbtxt import BACKEND, DEFAULT_MODEL_FILENAME, PLATFORM
from serve.model.encoded_image import DEFAULT_MAX_PIXELS, declared_image
from serve.model.implicit_state import hidden_inputs, hidden_outputs
from serve.model.padding import Padding
from serve.pb import model_config_pb2 as pb
from serve.protocol.datatypes import BY_CONFIG_NAME, BY_ONNX_TYPE, DATATYPES, DataType
from serve.scheduling.sequence_config import DEFAULT_IDLE_MICROSECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from serve.model.encoded_image import EncodedImage
    from serve.request import Tensor
    from serve.runtime.session import GraphTensor


def _fits(shape: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    """Whether a shape has the rank and every fixed dimension of `allowed`, where -1 is any size."""
    return len(shape) == len(allowed) and all(
        want in (-1, got) for want, got in zip(allowed, shape, strict=True)
    )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output as a client sees it.

    Attributes:
        name: its name in the graph.
        datatype: its element type.
        shape: -1 for a dimension of any size; the batch dimension comes first where the model has one.
        labels: class names by index, for the classification extension; outputs only.
        reshape: the shape that the graph has instead, without the batch dimension; None: the same.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    reshape: tuple[int, ...] | None = None

    def check(self, tensor: Tensor) -> None:
        """Raise InvalidArgumentError when a request's tensor doesn't fit."""
        if tensor.datatype is not self.datatype:
            raise InvalidArgumentError(
                f"input '{self.name}': expected datatype {self.datatype.name}, got {tensor.datatype.name}"
            )
        shape = tensor.array.shape
        # onnxruntime describes an input of unknown rank as it does a scalar, so [] takes any shape.
        if self.shape and not _fits(shape, self.shape):
            raise InvalidArgumentError(
                f"input '{self.name}': expected shape {list(self.shape)}, got {list(shape)}"
            )

    def to_graph(self, array: np.ndarray, *, batched: bool) -> np.ndarray:
        """A client's input in the graph's shape."""
        if self.reshape is None:
            return array
        return array.reshape(_other_shape(array.shape, self.shape, self.reshape, batched=batched))

    def to_client(self, array: np.ndarray, *, batched: bool) -> np.ndarray:
        """The graph's output in the client's shape."""
        if self.reshape is None:
            return array
        graph = (-1, *self.reshape) if batched else self.reshape
        target = self.shape[1:] if batched else self.shape
        return array.reshape(_other_shape(array.shape, graph, target, batched=batched))


def _other_shape(
    actual: tuple[int, ...], stated: tuple[int, ...], target: tuple[int, ...], *, batched: bool
) -> tuple[int, ...]:
    """`target` with the batch before it, its dimensions of any size taken from `actual` in their order."""
    sizes = iter([size for size, want in zip(actual, stated, strict=True) if want == -1][batched:])
    rows = actual[:1] if batched else ()
    return (*rows, *(next(sizes) if want == -1 else want for want in target))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the server needs to know of one model version.

    Attributes:
        name: the model's name, that of its folder.
        max_batch_size: largest batch a request may send; 0: shapes are the graph's own and any batch that the
            graph takes is served.
        inputs: by name, in the config's order.
        outputs: by name, in the config's order.
        message: the same and the rest of config.pbtxt, completed, as the ModelConfig RPC answers it.
        encoded_image: how to decode the input that takes image files; BYTES to a client, pixels to the graph.
        padding: how rows of different lengths make up a batch; None: they don't.
    """

    name: str
    max_batch_size: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    message: pb.ModelConfig
    encoded_image: EncodedImage | None = None
    padding: Padding | None = None

    @property
    def request_bytes(self) -> int:
        """Bytes of the inputs at the largest batch; dimensions of any size, and BYTES, can't be counted."""
        return sum(
            abs(math.prod(spec.shape)) * spec.datatype.itemsize for spec in self.inputs.values()
        ) * max(1, self.max_batch_size)


def resolve(
    message: pb.ModelConfig,
    name: str,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    labels: Mapping[str, tuple[str, ...]],
    *,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
) -> ModelConfig:
    """Complete a config from the loaded graph's tensors and check what it states against them.

    Args:
        message: what `read_config` returned.
        name: the model's name.
        inputs: the graph's.
        outputs: the graph's.
        labels: output name to class names, read from the label files.
        max_image_pixels: see `serve.model.encoded_image.EncodedImage`.

    Raises:
        ModelLoadError: the config states another tensor, datatype or shape than the graph has, or image files
            can't be decoded for it.
    """
    hidden = hidden_inputs(message)
    inputs = [tensor for tensor in inputs if tensor.name not in hidden]
    if not message.output:
        outputs = [tensor for tensor in outputs if tensor.name not in hidden_outputs(message)]
    encoded = declared_image(message, inputs, max_image_pixels)
    if encoded is not None and message.HasField("sequence_batching"):
        raise ModelLoadError(
            "config.pbtxt: sequence_batching needs requests in order, and image files (parameter "
            "'encoded_image') are decoded side by side: send pixels"
        )
    if encoded is not None:
        inputs = [_as_files(tensor) if tensor.name == encoded.name else tensor for tensor in inputs]
    batched = message.max_batch_size > 0
    if batched and not inputs:
        raise ModelLoadError("config.pbtxt: max_batch_size is above 0, but the graph has no input to batch")
    missing = {tensor.name for tensor in inputs} - {tensor.name for tensor in message.input}
    if message.input and missing:
        raise ModelLoadError(f"config.pbtxt: the graph's input {min(missing)!r} is missing")
    input_specs = _resolve_tensors("input", message.input, inputs, {}, batched=batched)
    output_specs = _resolve_tensors("output", message.output, outputs, labels, batched=batched)
    padding = Padding.from_config(message)
    if padding is not None:
        padding.check_names(_shapes(input_specs), _shapes(output_specs))
        if any(s.reshape is not None for s in (*input_specs.values(), *output_specs.values())):
            raise ModelLoadError("config.pbtxt: parameter 'length_axis' can't go with reshape: remove one")
    completed = complete_config(message, name, input_specs, output_specs)
    return ModelConfig(name, message.max_batch_size, input_specs, output_specs, completed, encoded, padding)


def _as_files(image: GraphTensor) -> GraphTensor:
    """An input of pixels [batch, height, width, channels] as clients see it: a file for each row."""
    return replace(image, onnx_type=DATATYPES["BYTES"].onnx, shape=(image.shape[0], 1))


def complete_config(
    message: pb.ModelConfig, name: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> pb.ModelConfig:
    """A copy of a config with what the file left out: names, the tensors, and Triton's defaults."""
    completed = pb.ModelConfig()
    completed.CopyFrom(message)
    completed.name, completed.platform, completed.backend = name, PLATFORM, BACKEND
    completed.default_model_filename = message.default_model_filename or DEFAULT_MODEL_FILENAME
    if not completed.version_policy.WhichOneof("policy_choice"):
        completed.version_policy.latest.num_versions = 1
    if completed.HasField("sequence_batching"):
        sequences = completed.sequence_batching
        sequences.max_sequence_idle_microseconds = (
            sequences.max_sequence_idle_microseconds or DEFAULT_IDLE_MICROSECONDS
        )
    skipped = 1 if message.max_batch_size else 0
    for specs, fields in ((inputs, completed.input), (outputs, completed.output)):
        stated = {field.name: field for field in fields}
        for spec in specs.values():
            field = stated[spec.name] if spec.name in stated else fields.add(name=spec.name)
            field.data_type = getattr(pb, spec.datatype.config)
            field.dims[:] = spec.shape[skipped:]
    return completed


def _resolve_tensors(
    role: str,
    stated: Sequence[Any],
    graph: Sequence[GraphTensor],
    labels: Mapping[str, tuple[str, ...]],
    *,
    batched: bool,
) -> dict[str, TensorSpec]:
    by_name = {tensor.name: tensor for tensor in graph}
    specs = {}
    for name, config in {c.name: c for c in stated}.items() if stated else dict.fromkeys(by_name).items():
        tensor = by_name.get(name)
        if tensor is None:
            raise ModelLoadError(
                f"config.pbtxt: {role} '{name}' is not in the graph, which has {list(by_name)}"
            )
        specs[name] = _resolve_tensor(
            f"{role} '{name}'", config, tensor, labels.get(name, ()), batched=batched
        )
    return specs


def _resolve_tensor(
    what: str, config: Any, tensor: GraphTensor, labels: tuple[str, ...], *, batched: bool
) -> TensorSpec:
    datatype = BY_ONNX_TYPE.get(tensor.onnx_type)
    if datatype is None:
        raise ModelLoadError(f"{what} is a {tensor.onnx_type}, which the protocol has no datatype for")
    shape = tensor.shape
    if batched and (not shape or shape[0] != -1):
        raise ModelLoadError(
            f"{what}: max_batch_size is above 0, but the graph's shape {list(shape)} has no dynamic first "
            "dimension: set max_batch_size to 0"
        )
    if config is None or not (config.dims or config.data_type):
        return TensorSpec(tensor.name, datatype, shape, labels)
    stated_type = pb.DataType.Name(config.data_type)
    if BY_CONFIG_NAME.get(stated_type) is not datatype:
        raise ModelLoadError(f"config.pbtxt: {what} is {stated_type}, the graph has {datatype.config}")
    rows = (-1,) if batched else ()
    stated = (*rows, *config.dims)
    reshape = tuple(config.reshape.shape) if config.HasField("reshape") else None
    in_graph = stated if reshape is None else (*rows, *reshape)
    if shape and not _fits(in_graph, shape):
        raise ModelLoadError(f"config.pbtxt: {what} has shape {list(in_graph)}, the graph has {list(shape)}")
    if reshape is not None and _elements(reshape) != _elements(config.dims):
        raise ModelLoadError(
            f"config.pbtxt: {what} has dims {list(config.dims)} and reshape {list(reshape)}, expected the "
            "same number of elements and of dimensions of any size"
        )
    return TensorSpec(tensor.name, datatype, stated, labels, reshape)


def _shapes(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in specs.items()}


def _elements(dims: Sequence[int]) -> tuple[int, int]:
    return math.prod(size for size in dims if size != -1), sum(size == -1 for size in dims)
