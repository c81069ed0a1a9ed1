"""Reading config.pbtxt: Triton's ModelConfig in text protobuf.

A field that this server doesn't support is an error that names it; none is ignored in silence.
"""

from __future__ import annotations

import difflib
import logging
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format

from serve.errors import ModelLoadError
from serve.generate import generation_config
from serve.model.encoded_image import PARAMETER as ENCODED_IMAGE
from serve.model.padding import PARAMETERS as LENGTH_PARAMETERS
from serve.pb import model_config_pb2 as pb
from serve.runtime.backend_config import PARAMETERS, takes_parameter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from google.protobuf.message import Message

logger = logging.getLogger(__name__)

DEFAULT_MODEL_FILENAME = "model.onnx"
_NEAR = 0.8  # of two names that differ by a letter or two
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"

# What the server itself reads of a config's parameters; `serve.runtime.backend_config` has onnxruntime's,
# `serve.generate.generation_config` those of models that generate.
OWN_PARAMETERS = (ENCODED_IMAGE, *LENGTH_PARAMETERS)

_NOT_ON_A_CPU = "onnxruntime's providers decide it"

_REFUSED = {
    "ensemble_scheduling": "ensembles are not; call the models one after the other",
    "input.optional": "every input of the graph is needed",
    "input.allow_ragged_batch": "ragged batches are not; rows can be padded to one length (length_axis)",
}

# Each field is either looked into ({...}), taken whole ({}), or taken without effect (the reason, which is
# logged): hints about speed on another server. A field that is not here is refused.
_TENSOR_FIELDS: dict[str, Any] = {"name": {}, "data_type": {}, "dims": {}}
_SUPPORTED: dict[str, Any] = {
    "name": {},
    "platform": {},
    "backend": {},
    "runtime": "onnxruntime is built in",
    "max_batch_size": {},
    "input": {**_TENSOR_FIELDS, "reshape": {}, "format": {}},
    "output": {**_TENSOR_FIELDS, "reshape": {}, "label_filename": {}},
    "version_policy": {"latest": {"num_versions": {}}, "all": {}, "specific": {"versions": {}}},
    "instance_group": {
        "name": {},
        "count": {},
        "kind": {},
        "gpus": {},
        "host_policy": "use the operating system's affinity",
        "rate_limiter": "instances run when they are free",
    },
    "default_model_filename": {},
    "metric_tags": {},
    "parameters": {},
    "dynamic_batching": {},
    "sequence_batching": {},
    "model_warmup": {},
    "optimization": {
        "graph": {"level": {}},
        "execution_accelerators": {},
        "priority": "models have no priority over each other",
        "cuda": _NOT_ON_A_CPU,
        "input_pinned_memory": _NOT_ON_A_CPU,
        "output_pinned_memory": _NOT_ON_A_CPU,
        "gather_kernel_buffer_threshold": _NOT_ON_A_CPU,
        "eager_batching": "batches are made as soon as an instance is free",
    },
    "model_transaction_policy": {},
    "response_cache": {"enable": "responses are not cached"},
    "model_metrics": "histograms have fixed buckets",
}
# Such a model's tensors are the server's own, whatever the graph's are.
_SUPPORTED_OF_GENERATION = {
    **_SUPPORTED,
    "input": {**_TENSOR_FIELDS, "optional": {}},
    "output": _TENSOR_FIELDS,
}


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
    check_config(message, folder.name)
    return message


def check_config(message: pb.ModelConfig, name: str) -> None:
    """Check a config that was read from a file or came with a load request.

    Args:
        message: the config.
        name: the model that it is for.

    Raises:
        ModelLoadError: see `read_config`.
    """
    generates = generation_config.is_generation(message) or generation_config.is_twin(message)
    supported = _SUPPORTED_OF_GENERATION if generates else _SUPPORTED
    for field, reason in _unsupported(message, supported):
        logger.warning("config.pbtxt of '%s': field '%s' has no effect: %s", name, field, reason)
    for field, expected in (("name", name), ("platform", PLATFORM), ("backend", BACKEND)):
        value = getattr(message, field)
        if value not in ("", expected):
            raise ModelLoadError(f"config.pbtxt: {field} is {value!r}, expected {expected!r} or nothing")
    for parameter in message.parameters:
        _check_parameter(parameter, name, generates=generates)
    if message.max_batch_size < 0:
        raise ModelLoadError(f"config.pbtxt: max_batch_size is {message.max_batch_size}, expected 0 or more")
    if generates:
        generation_config.check_generation_fields(message)
    elif message.model_transaction_policy.decoupled:
        raise ModelLoadError(
            "config.pbtxt: model_transaction_policy.decoupled is true, but a graph answers each request once"
        )
    _refuse_path("default_model_filename", message.default_model_filename)
    for output in message.output:
        _refuse_path(f"label_filename of output '{output.name}'", output.label_filename)


def _check_parameter(parameter: str, model: str, *, generates: bool) -> None:
    """Refuse what looks like a typing error; what means nothing here is somebody's note, as in Triton."""
    if generates and parameter in OWN_PARAMETERS:
        raise ModelLoadError(
            f"config.pbtxt: parameter '{parameter}' can't go with token generation: remove it"
        )
    # A note of another model may be called `logits`; but a mark with a letter wrong, and it doesn't generate.
    own = generation_config.PARAMETERS if generates else (*OWN_PARAMETERS, *generation_config.MARKS)
    if parameter in own or takes_parameter(parameter):
        return
    if parameter in generation_config.PARAMETERS:
        reason = f"the model has none of {', '.join(generation_config.MARKS)}"
    else:
        near = difflib.get_close_matches(parameter, (*own, *PARAMETERS), 1, _NEAR)
        if near:
            raise ModelLoadError(
                f"config.pbtxt: parameter '{parameter}' is unknown: did you mean '{near[0]}'?"
            )
        reason = "it is unknown"
    logger.warning("config.pbtxt of '%s': parameter '%s' has no effect: %s", model, parameter, reason)


def _refuse_path(field: str, filename: str) -> None:
    if "/" in filename or "\\" in filename or filename in (".", ".."):
        raise ModelLoadError(f"config.pbtxt: {field} is {filename!r}, expected a file name without a folder")


def _unsupported(
    message: Message, supported: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Refuse what is not supported; the fields without effect, with the reason of each."""
    for descriptor, value in message.ListFields():
        field = prefix + descriptor.name
        if descriptor.name not in supported:
            advice = _REFUSED.get(field, "remove it, or serve the model elsewhere")
            raise ModelLoadError(f"config.pbtxt: field '{field}' is not supported by this server: {advice}")
        inner = supported[descriptor.name]
        if isinstance(inner, str):
            yield field, inner
        elif inner:
            for part in value if descriptor.is_repeated else (value,):
                yield from _unsupported(part, inner, f"{field}.")


def select_versions(message: pb.ModelConfig, available: Iterable[int]) -> list[int]:
    """The versions that the config's version_policy serves, ascending; without one the latest.

    Raises:
        ModelLoadError: there is no version at all, or not one that the policy names.
    """
    versions = sorted(available)
    if not versions and generation_config.is_twin(message):
        return [1]  # it has no file that could lie in a folder
    if not versions:
        raise ModelLoadError(f"no version folder: expected 1/{DEFAULT_MODEL_FILENAME} in the model's folder")
    policy = message.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return versions
    if choice == "specific":
        wanted = set(policy.specific.versions)
        missing = sorted(wanted.difference(versions))
        text = f"version_policy.specific asks for {missing}, the folder has {versions}"
        if len(missing) == len(wanted):
            raise ModelLoadError(text)
        if missing:
            logger.error("'%s': %s", message.name, text)
        return sorted(wanted.intersection(versions))
    # proto3 can't tell 0 from unset; Triton's default is one version.
    return versions[-(policy.latest.num_versions or 1) :]
