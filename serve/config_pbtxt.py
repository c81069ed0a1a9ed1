"""Reading config.pbtxt: Triton's ModelConfig in text protobuf.

A field that this server doesn't support is an error that names it; none is ignored in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format

from serve.encoded_image import PARAMETER as ENCODED_IMAGE
from serve.errors import ModelLoadError
from serve.pb import model_config_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from google.protobuf.message import Message

DEFAULT_MODEL_FILENAME = "model.onnx"
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"

# Model parameters of Triton's onnxruntime backend that are honoured here, and one of our own.
PARAMETERS = ("intra_op_thread_count", "inter_op_thread_count", ENCODED_IMAGE)

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


def _count_parameter(message: pb.ModelConfig, name: str, default: int) -> int:
    if name not in message.parameters:
        return default
    text = message.parameters[name].string_value
    if not text.isdecimal():
        raise ModelLoadError(
            f"config.pbtxt: parameter '{name}' is {text!r}, expected a number, 0 for the default"
        )
    return int(text) or default
