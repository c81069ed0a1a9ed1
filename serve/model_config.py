"""config.pbtxt → `ModelConfig`: Triton's ModelConfig, completed from the graph and checked against it.

A field that this server doesn't support is an error that names it; none is ignored in silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format

from serve.datatypes import BY_CONFIG_NAME, BY_ONNX_TYPE, DataType
from serve.errors import InvalidArgumentError, ModelLoadError
from serve.pb import model_config_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

    from serve.request import Tensor
    from serve.session import GraphTensor

DEFAULT_MODEL_FILENAME = "model.onnx"
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"

# Model parameters of Triton's onnxruntime backend that are honoured here.
PARAMETERS = ("intra_op_thread_count", "inter_op_thread_count")

_TENSOR_FIELDS: dict[str, Any] = {"name": {}, "data_type": {}, "dims": {}}
_SUPPORTED: dict[str, Any] = {
    "name": {},
    "platform": {},
    "backend": {},
    "max_batch_size": {},
    "input": {**_TENSOR_FIELDS, "format": {}},
    "output": {**_TENSOR_FIELDS, "label_filename": {}},
    "version_policy": {"latest": {"num_versions": {}}, "all": {}, "specific": {"versions": {}}},
    "instance_group": {"name": {}, "count": {}, "kind": {}},
    "default_model_filename": {},
    "parameters": {},
    "optimization": {"graph": {"level": {}}},
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output as a client sees it.

    Attributes:
        name: its name in the graph.
        datatype: its element type.
        shape: -1 for a dimension of any size; the batch dimension comes first where the model has one.
        labels: class names by index, for the classification extension; outputs only.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()

    def check(self, tensor: Tensor) -> None:
        """Raise InvalidArgumentError when a request's tensor doesn't fit."""
        if tensor.datatype is not self.datatype:
            raise InvalidArgumentError(
                f"input '{self.name}': expected datatype {self.datatype.name}, got {tensor.datatype.name}"
            )
        shape = tensor.array.shape
        # A graph input of unknown rank reads as [] too, so there onnxruntime itself has the last word.
        if self.shape and (
            len(shape) != len(self.shape)
            or any(want not in (-1, got) for want, got in zip(self.shape, shape, strict=True))
        ):
            raise InvalidArgumentError(
                f"input '{self.name}': expected shape {list(self.shape)}, got {list(shape)}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the server needs to know of one model version.

    Attributes:
        name: the model's name, that of its folder.
        max_batch_size: largest batch a request may send; 0: shapes are the graph's own and any batch that the
            graph takes is served.
        inputs: by name, in the config's order.
        outputs: by name, in the config's order.
    """

    name: str
    max_batch_size: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    @property
    def request_bytes(self) -> int:
        """Bytes of the inputs at the largest batch; dimensions of any size, and BYTES, can't be counted."""
        return sum(
            abs(math.prod(spec.shape)) * spec.datatype.itemsize for spec in self.inputs.values()
        ) * max(1, self.max_batch_size)


@dataclass(frozen=True, slots=True)
class InstanceSettings:
    """How a model's graph is to be run, as far as its config says.

    Attributes:
        count: how many runs may go on at once; 0: the server's default.
        kind: KIND_AUTO, KIND_CPU or KIND_GPU.
        intra_op_threads: threads within one run; 0: the cores divided among the instances.
        inter_op_threads: threads across a graph's branches; above 1 the branches run in parallel.
        graph_level: optimization.graph.level as in Triton: 0 all, 1 extended, -1 basic, 2 none.
    """

    count: int
    kind: str
    intra_op_threads: int
    inter_op_threads: int
    graph_level: int


def read_config(folder: Path) -> pb.ModelConfig:
    """The model folder's config.pbtxt, or an empty config where there is none.

    Raises:
        ModelLoadError: it is no valid text of a ModelConfig, has a field that is not supported here, or is
            meant for another model or backend.
    """
    path = folder / "config.pbtxt"
    message = pb.ModelConfig()
    if path.is_file():
        try:
            text_format.Parse(path.read_text(encoding="utf-8"), message)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"config.pbtxt: {error}") from error
    _refuse_unsupported(message, _SUPPORTED)
    for field, expected in (("name", folder.name), ("platform", PLATFORM), ("backend", BACKEND)):
        value = getattr(message, field)
        if value not in ("", expected):
            raise ModelLoadError(f"config.pbtxt: {field} is {value!r}, expected {expected!r} or nothing")
    if message.max_batch_size < 0:
        raise ModelLoadError(f"config.pbtxt: max_batch_size is {message.max_batch_size}, expected 0 or more")
    _refuse_path("default_model_filename", message.default_model_filename)
    for output in message.output:
        _refuse_path(f"label_filename of output '{output.name}'", output.label_filename)
    return message


def _refuse_path(field: str, filename: str) -> None:
    if "/" in filename or "\\" in filename or filename in (".", ".."):
        raise ModelLoadError(f"config.pbtxt: {field} is {filename!r}, expected a file name without a folder")


def _refuse_unsupported(message: Message, supported: Mapping[str, Any], prefix: str = "") -> None:
    for descriptor, value in message.ListFields():
        field = prefix + descriptor.name
        if descriptor.name not in supported:
            raise ModelLoadError(
                f"config.pbtxt: field '{field}' is not supported by this server: "
                "remove it, or serve the model elsewhere"
            )
        inner = supported[descriptor.name]
        if inner:
            for part in value if descriptor.is_repeated else (value,):
                _refuse_unsupported(part, inner, f"{field}.")
    if isinstance(message, pb.ModelConfig):
        for name in message.parameters:
            if name not in PARAMETERS:
                raise ModelLoadError(
                    f"config.pbtxt: parameter '{name}' is not supported, "
                    f"expected one of {', '.join(PARAMETERS)}"
                )


def select_versions(message: pb.ModelConfig, available: Iterable[int]) -> list[int]:
    """The versions that the config's version_policy serves, ascending; without one the latest.

    Raises:
        ModelLoadError: there is no version at all, or not one that the policy names.
    """
    versions = sorted(available)
    if not versions:
        raise ModelLoadError(f"no version folder: expected 1/{DEFAULT_MODEL_FILENAME} in the model's folder")
    policy = message.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return versions
    if choice == "specific":
        missing = [version for version in policy.specific.versions if version not in versions]
        if missing:
            raise ModelLoadError(f"version_policy.specific asks for {missing}, the folder has {versions}")
        return sorted(set(policy.specific.versions))
    # proto3 can't tell 0 from unset; Triton's default is one version.
    return versions[-(policy.latest.num_versions or 1) :]


def instance_settings(message: pb.ModelConfig) -> InstanceSettings:
    """The config's wishes about threads, instances and devices.

    Raises:
        ModelLoadError: one of them can't be.
    """
    groups = message.instance_group
    if len(groups) > 1 or (groups and groups[0].count < 0):
        raise ModelLoadError("config.pbtxt: expected at most one instance_group, with a count of 0 or more")
    return InstanceSettings(
        count=groups[0].count if groups else 0,
        kind=pb.ModelInstanceGroup.Kind.Name(groups[0].kind) if groups else "KIND_AUTO",
        intra_op_threads=_count_parameter(message, "intra_op_thread_count", 0),
        inter_op_threads=_count_parameter(message, "inter_op_thread_count", 1),
        graph_level=message.optimization.graph.level,
    )


def resolve(
    message: pb.ModelConfig,
    name: str,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    labels: Mapping[str, tuple[str, ...]],
) -> ModelConfig:
    """Complete a config from the loaded graph's tensors and check what it states against them.

    Args:
        message: what `read_config` returned.
        name: the model's name.
        inputs: the graph's.
        outputs: the graph's.
        labels: output name to class names, read from the label files.

    Raises:
        ModelLoadError: the config states another tensor, datatype or shape than the graph has.
    """
    batched = message.max_batch_size > 0
    if batched and not inputs:
        raise ModelLoadError("config.pbtxt: max_batch_size is above 0, but the graph has no input to batch")
    missing = {tensor.name for tensor in inputs} - {tensor.name for tensor in message.input}
    if message.input and missing:
        raise ModelLoadError(f"config.pbtxt: the graph's input {min(missing)!r} is missing")
    return ModelConfig(
        name=name,
        max_batch_size=message.max_batch_size,
        inputs=_resolve_tensors("input", message.input, inputs, {}, batched=batched),
        outputs=_resolve_tensors("output", message.output, outputs, labels, batched=batched),
    )


def _count_parameter(message: pb.ModelConfig, name: str, default: int) -> int:
    if name not in message.parameters:
        return default
    text = message.parameters[name].string_value
    if not text.isdecimal():
        raise ModelLoadError(
            f"config.pbtxt: parameter '{name}' is {text!r}, expected a number, 0 for the default"
        )
    return int(text) or default


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
    stated = (-1, *config.dims) if batched else tuple(config.dims)
    if shape and (
        len(stated) != len(shape)
        or any(want not in (-1, got) for want, got in zip(shape, stated, strict=True))
    ):
        raise ModelLoadError(f"config.pbtxt: {what} has shape {list(stated)}, the graph has {list(shape)}")
    return TensorSpec(tensor.name, datatype, stated, labels)
