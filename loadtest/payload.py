"""Requests for any model, made from what the server says of it: random tensors, rows, or prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.tensors import INTEGER_END, NUMBERS, RequestError, add_tensor, random_tensor, text_element
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from loadtest.target import Questions

# Different requests in turn, so that a server that remembers answers or prefixes gains nothing by it.
VARIANTS = 16
_VARIANT_BYTES = 16 << 20
# A sequence of one request each, whose id should not be live when it is used again.
_SEQUENCES = 4096
# In letters that any vocabulary has, short enough for small contexts; each begins in its own way, for a
# server may keep what prompts have in common at their beginning.
_PROMPTS = (
    "A river runs", "Before the war", "Come with me", "Down in the sea", "Every morning", "Far from home",
    "Give me a word", "He who waits", "In the garden", "Just then a man", "Kings and queens",
    "Look at the sky",
    "My good friend", "No one came", "Over the hills", "Please tell me",
)  # fmt: skip
_GENERATED = ("text_output", "output_ids")


@dataclass(frozen=True)
class ModelSpec:
    """What is asked of which model.

    Attributes:
        name, version: of the model; no version: the server's choice.
        weight: its share of the requests, against the other models' weights.
        batch_size: rows in a request.
        shapes: an input's dimensions beside the batch, where the model leaves some open.
        data: an .npz file with arrays by input name, rows along the first axis; `golden.npz` of an entry is
            one.
        prompts: texts for a model that generates text.
        max_tokens: how many tokens it is asked for.
        parameters: of the request.
    """

    name: str
    version: str = ""
    weight: float = 1.0
    batch_size: int = 1
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    data: Path | None = None
    prompts: tuple[str, ...] = ()
    max_tokens: int = 32
    parameters: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelLoad:
    """A model and the requests that are sent to it in turn.

    Attributes:
        spec: what was asked for.
        version: that answers.
        requests: serialized ModelInferRequests.
        streams: whether the answer is a stream (ModelStreamInfer).
        inputs: the names of all that it takes.
        ones: those of which a dimension beside the batch is open in the model and not said, and is 1.
    """

    spec: ModelSpec
    version: str
    requests: tuple[bytes, ...]
    streams: bool = False
    inputs: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()


def load_of(questions: Questions, spec: ModelSpec, seed: int = 0) -> ModelLoad:
    """The requests for a model of a server.

    Raises:
        TargetError: the server isn't there, or doesn't have the model.
        RequestError: it can't be asked so.
    """
    metadata = questions.metadata(spec.name, spec.version)
    config = questions.config(spec.name, spec.version)
    version = spec.version or max(metadata.versions, key=lambda text: (len(text), text), default="")
    _check_batch(metadata, spec, config.max_batch_size)
    optional = {tensor.name for tensor in config.input if tensor.optional}
    streams = bool(config.model_transaction_policy.decoupled)
    requests: list[bytes] = []
    sequences = bool(config.WhichOneof("scheduling_choice") == "sequence_batching")
    for variant in range(_SEQUENCES if sequences else VARIANTS):
        request = _request(metadata, optional, spec, seed, variant)
        if sequences:
            request.parameters["sequence_id"].int64_param = variant + 1
            request.parameters["sequence_start"].bool_param = True
            request.parameters["sequence_end"].bool_param = True
        requests.append(request.SerializeToString())
        if sum(map(len, requests)) > _VARIANT_BYTES:
            break
    names = tuple(tensor.name for tensor in metadata.inputs)
    return ModelLoad(spec, version, tuple(requests), streams, names, _ones(metadata, spec))


def _ones(metadata: pb.ModelMetadataResponse, spec: ModelSpec) -> tuple[str, ...]:
    if spec.data or _generates(metadata):
        return ()
    left = (tensor for tensor in metadata.inputs if tensor.name not in spec.shapes)
    return tuple(tensor.name for tensor in left if any(dim < 0 for dim in tensor.shape[1:]))


def _check_batch(metadata: pb.ModelMetadataResponse, spec: ModelSpec, most: int) -> None:
    if spec.batch_size == 1:
        return
    if not any(tensor.shape and tensor.shape[0] < 0 for tensor in metadata.inputs):
        raise RequestError(f"model '{spec.name}' takes no batches, --batch-size is {spec.batch_size}")
    if 0 < most < spec.batch_size:
        raise RequestError(
            f"model '{spec.name}' takes {most} rows at most, --batch-size is {spec.batch_size}"
        )


def request_bytes(metadata: pb.ModelMetadataResponse, batch: int = 1, seed: int = 0) -> bytes:
    """A serialized ModelInferRequest with random inputs: floats in [0, 1), any pixels, small integers.

    Args:
        metadata: of the model.
        batch: size of a first dimension that is dynamic; other dynamic dimensions become 1.
        seed: of the random numbers.

    Raises:
        RequestError: an input's datatype is none that this can make.
    """
    spec = ModelSpec(metadata.name, batch_size=batch)
    return _request(metadata, set(), spec, seed, 0).SerializeToString()


def _request(
    metadata: pb.ModelMetadataResponse, optional: set[str], spec: ModelSpec, seed: int, variant: int
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=spec.name, model_version=spec.version)
    for name, value in spec.parameters.items():
        kind = {bool: "bool", int: "int64", float: "double", str: "string"}[type(value)]
        setattr(request.parameters[name], f"{kind}_param", value)
    if _generates(metadata):
        _add_prompt(request, metadata, spec, variant)
        return request
    random = np.random.default_rng((seed, variant))
    arrays = _rows_of_file(spec.data, variant * spec.batch_size, spec.batch_size) if spec.data else {}
    if unknown := arrays.keys() - {tensor.name for tensor in metadata.inputs}:
        raise RequestError(
            f"model '{spec.name}' has no input '{min(unknown)}', only "
            f"{', '.join(repr(tensor.name) for tensor in metadata.inputs)}"
        )
    for tensor in metadata.inputs:
        if tensor.name in arrays:
            add_tensor(request, tensor, *_as_tensor(spec, tensor, arrays[tensor.name]))
        elif tensor.name not in optional:
            shape = _shape(spec, tensor)
            add_tensor(request, tensor, shape, random_tensor(random, tensor, prod(shape)))
    return request


def _shape(spec: ModelSpec, tensor: Any) -> list[int]:
    """The model's shape: the first dimension is the batch where it is open, others are the user's or 1."""
    dims = list(tensor.shape)
    wanted = spec.shapes.get(tensor.name)
    if wanted is None:
        return [dim if dim >= 0 else 1 if axis else spec.batch_size for axis, dim in enumerate(dims)]
    if len(wanted) == len(dims) - 1:
        wanted = (spec.batch_size, *wanted)
    if len(wanted) != len(dims) or any(b >= 0 and a != b for a, b in zip(wanted, dims, strict=True)):
        raise RequestError(f"model '{spec.name}', input '{tensor.name}': --shape {wanted} doesn't fit {dims}")
    return list(wanted)


def _rows_of_file(path: Path, first: int, count: int) -> dict[str, NDArray[Any]]:
    """So many rows of each input's array, from the start again after the last."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise RequestError(
            f"data '{path}': expected an .npz file of arrays by input name: {error}"
        ) from error
    if golden := {name.removeprefix("input."): a for name, a in arrays.items() if name.startswith("input.")}:
        arrays = golden
    if not arrays or any(not array.ndim or not len(array) for array in arrays.values()):
        raise RequestError(f"data '{path}': expected arrays with rows along the first axis")
    return {
        name: array.take(range(first, first + count), axis=0, mode="wrap") for name, array in arrays.items()
    }


def _as_tensor(spec: ModelSpec, tensor: Any, array: NDArray[Any]) -> tuple[list[int], bytes]:
    if tensor.datatype == "BYTES":
        elements = (
            item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()
        )
        return list(array.shape), b"".join(map(text_element, elements))
    if tensor.datatype not in NUMBERS or not np.can_cast(array.dtype, NUMBERS[tensor.datatype], "same_kind"):
        raise RequestError(
            f"data '{spec.data}': '{tensor.name}' is {array.dtype}, the model takes {tensor.datatype}"
        )
    return list(array.shape), array.astype(NUMBERS[tensor.datatype]).tobytes()


def _generates(metadata: pb.ModelMetadataResponse) -> bool:
    """Whether a model takes a prompt and answers with more text, or ids."""
    inputs = {tensor.name for tensor in metadata.inputs}
    outputs = {tensor.name for tensor in metadata.outputs}
    texts = "text_input" in inputs and "text_output" in outputs
    return texts or ("input_ids" in inputs and "output_ids" in outputs)


def _add_prompt(
    request: pb.ModelInferRequest, metadata: pb.ModelMetadataResponse, spec: ModelSpec, variant: int
) -> None:
    """The tensors of Triton's generate models: a prompt, how many tokens, and that they are to be counted."""
    inputs = {tensor.name: tensor for tensor in metadata.inputs}
    values: dict[str, Any] = {
        "max_tokens": spec.max_tokens, "stream": True, "return_num_output_tokens": True,
        "exclude_input_in_output": True,
    }  # fmt: skip
    if "text_input" in inputs:
        prompts = spec.prompts or _PROMPTS
        values["text_input"] = prompts[variant % len(prompts)]
    else:
        ids = np.random.default_rng(variant).integers(0, INTEGER_END, 16)
        add_tensor(
            request, inputs["input_ids"], _one_row(inputs["input_ids"], len(ids)), ids.astype("<i8").tobytes()
        )
    for name, value in values.items():
        if name in inputs:
            tensor = inputs[name]
            raw = text_element(value.encode()) if tensor.datatype == "BYTES" else _number(tensor, value)
            add_tensor(request, tensor, _one_row(tensor, 1), raw)
    answered = {tensor.name for tensor in metadata.outputs}
    for name in (_GENERATED[0] if "text_input" in inputs else _GENERATED[1], "num_output_tokens"):
        if name in answered:
            request.outputs.add(name=name)


def _one_row(tensor: Any, last: int) -> list[int]:
    return [*(1 if dim < 0 else dim for dim in tensor.shape[:-1]), last]


def _number(tensor: Any, value: Any) -> bytes:
    return np.array(value).astype(NUMBERS[tensor.datatype]).tobytes()
