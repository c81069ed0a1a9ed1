"""Wire messages to numpy and back: pure functions, every refusal an `InvalidArgumentError`.

Rules: Open Inference Protocol, "Tensor Data"; Triton's binary tensor data and classification extensions.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from serve.datatypes import DATATYPES, DataType
from serve.errors import InvalidArgumentError, UnsupportedError
from serve.pb import grpc_service_pb2 as pb
from serve.request import InferRequest, InferResponse, Parameter, RequestedOutput, Tensor
from serve.wire import append_raw_contents, split_raw_contents

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.message import Message

Buffer = bytes | memoryview

# Below this protobuf's own copies cost less than walking the fields in Python.
SPLIT_FROM_BYTES = 16 * 1024
_LENGTH_PREFIX = struct.Struct("<I")
_NO_PARAMETERS: Mapping[str, Parameter] = {}


def parse(message_type: type[Message]) -> Callable[[bytes], Any]:
    """A parser of one message type whose failures are `InvalidArgumentError`s."""

    def parse_message(data: bytes) -> Any:
        try:
            return message_type.FromString(data)
        except DecodeError as error:
            raise InvalidArgumentError(f"malformed {message_type.DESCRIPTOR.name}: {error}") from error

    return parse_message


_parse_infer_request = parse(pb.ModelInferRequest)


def decode_infer_request(data: bytes) -> InferRequest:
    """A serialized ModelInferRequest; arrays of fixed-size elements are read-only views on `data`.

    Raises:
        InvalidArgumentError: the message or a tensor in it is malformed.
        UnsupportedError: a tensor lies in shared memory.
    """
    if len(data) < SPLIT_FROM_BYTES:
        message = _parse_infer_request(data)
        raw: Sequence[Buffer] = message.raw_input_contents
    else:
        head, raw = split_raw_contents(data)
        message = _parse_infer_request(head)
    return InferRequest(
        message.model_name,
        message.model_version,
        _decode_inputs(message.inputs, raw),
        tuple(map(_decode_requested_output, message.outputs)),
        message.id,
        _decode_request_parameters(message.parameters) if message.parameters else _NO_PARAMETERS,
    )


def _decode_inputs(inputs: Sequence[Any], raw: Sequence[Buffer]) -> tuple[Tensor, ...]:
    tensors = []
    has_raw = len(raw) > 0
    for index, tensor in enumerate(inputs):
        if tensor.parameters:
            _refuse_shared_memory(tensor)
        datatype = DATATYPES.get(tensor.datatype)
        if datatype is None:
            raise InvalidArgumentError(
                f"input '{tensor.name}': datatype {tensor.datatype!r} is not one of {', '.join(DATATYPES)}"
            )
        shape = tuple(tensor.shape)
        has_contents = tensor.HasField("contents")
        if has_raw and has_contents:
            raise InvalidArgumentError(
                f"input '{tensor.name}' has typed contents beside raw_input_contents: "
                "send all inputs in the same form"
            )
        if index < len(raw):
            array = decode_tensor(tensor.name, datatype, shape, raw[index])
        elif has_contents:
            array = decode_contents(tensor.name, datatype, shape, tensor.contents)
        else:
            raise InvalidArgumentError(
                f"unable to find data for input '{tensor.name}': "
                f"neither raw_input_contents[{index}] nor contents is there"
            )
        tensors.append(Tensor(tensor.name, datatype, array))
    return tuple(tensors)


def _refuse_shared_memory(tensor: Any) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise UnsupportedError(
            f"'{tensor.name}': shared memory is not supported, send the tensor in the message"
        )


def element_count(name: str, shape: tuple[int, ...]) -> int:
    """Product of the dimensions.

    Raises:
        InvalidArgumentError: a dimension is negative.
    """
    if shape and min(shape) < 0:
        raise InvalidArgumentError(f"input '{name}': shape {list(shape)} has a negative dimension")
    return math.prod(shape)


def decode_tensor(name: str, datatype: DataType, shape: tuple[int, ...], raw: Buffer) -> np.ndarray:
    """Raw bytes as an array of `shape`: little-endian, row-major, a view except for BYTES.

    Raises:
        InvalidArgumentError: the byte count does not fit the shape, or BYTES elements are malformed.
    """
    count = element_count(name, shape)
    if datatype.name == "BYTES":
        return _reshape(name, _object_array(_split_bytes(name, raw, count)), shape)
    expected = count * datatype.itemsize
    if len(raw) != expected:
        raise InvalidArgumentError(
            f"input '{name}': expected {expected} bytes for {datatype.name} {list(shape)}, got {len(raw)}"
        )
    return _reshape(name, np.frombuffer(raw, datatype.dtype), shape)


def _reshape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return array.reshape(shape)
    except ValueError as error:
        raise InvalidArgumentError(f"input '{name}': shape {list(shape)} can't be served: {error}") from error


def _object_array(elements: Sequence[bytes]) -> np.ndarray:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def _split_bytes(name: str, raw: Buffer, count: int) -> list[bytes]:
    """The elements of a BYTES tensor: each a 4-byte little-endian length and that many bytes."""
    data = bytes(raw)
    elements: list[bytes] = []
    position = 0
    while position < len(data):
        start = position + _LENGTH_PREFIX.size
        if start > len(data):
            raise InvalidArgumentError(
                f"input '{name}': element {len(elements)} has {len(data) - position} of its length's 4 bytes"
            )
        position = start + _LENGTH_PREFIX.unpack_from(data, position)[0]
        if position > len(data):
            raise InvalidArgumentError(
                f"input '{name}': element {len(elements)} ends {position - len(data)} bytes past the data"
            )
        elements.append(data[start:position])
        if len(elements) > count:
            break
    if len(elements) != count:
        got = "more" if len(elements) > count else len(elements)
        raise InvalidArgumentError(
            f"input '{name}': expected {count} BYTES elements for its shape, got {got}"
        )
    return elements


def decode_contents(name: str, datatype: DataType, shape: tuple[int, ...], contents: Any) -> np.ndarray:
    """InferTensorContents as an array of `shape`.

    INT8, INT16, UINT8 and UINT16 take the low bytes of each 32-bit element, as in Triton.

    Raises:
        InvalidArgumentError: another field than the datatype's is filled, or the element count does not fit.
    """
    if datatype.contents is None:
        raise InvalidArgumentError(f"input '{name}': {datatype.name} has no typed contents, send raw bytes")
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if any(field != datatype.contents for field in filled):
        raise InvalidArgumentError(
            f"input '{name}': {datatype.name} belongs in {datatype.contents}, got {', '.join(filled)}"
        )
    values = getattr(contents, datatype.contents)
    count = element_count(name, shape)
    if len(values) != count:
        raise InvalidArgumentError(
            f"input '{name}': expected {count} elements for shape {list(shape)}, got {len(values)}"
        )
    if datatype.name == "BYTES":
        return _reshape(name, _object_array(values), shape)
    wide = np.array(values, dtype=_CONTENTS_DTYPES.get(datatype.contents, datatype.dtype))
    return _reshape(name, wide.astype(datatype.dtype, copy=False), shape)


_CONTENTS_DTYPES = {"int_contents": np.dtype("<i4"), "uint_contents": np.dtype("<u4")}


def _decode_requested_output(output: Any) -> RequestedOutput:
    if not output.parameters:
        return RequestedOutput(output.name)
    _refuse_shared_memory(output)
    if "classification" not in output.parameters:
        return RequestedOutput(output.name)
    parameter = output.parameters["classification"]
    if parameter.WhichOneof("parameter_choice") != "int64_param" or parameter.int64_param <= 0:
        raise InvalidArgumentError(f"output '{output.name}': classification must be an int64_param above 0")
    return RequestedOutput(output.name, parameter.int64_param)


_PARAMETER_TYPES = {
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}


def _decode_request_parameters(parameters: Any) -> dict[str, Parameter]:
    decoded: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        allowed = _PARAMETER_TYPES.get(name)
        if allowed is None and name.startswith("triton_"):
            raise InvalidArgumentError(f"parameter '{name}': names that start with triton_ are reserved")
        if choice is None or (allowed is not None and choice not in allowed):
            expected = " or ".join(allowed or ("a value",))
            raise InvalidArgumentError(f"parameter '{name}': expected {expected}, got {choice or 'none'}")
        decoded[name] = getattr(parameter, choice)
    return decoded


def encode_tensor(datatype: DataType, array: np.ndarray) -> Buffer:
    """An array as raw bytes: a view where its memory already is what the wire wants."""
    flat = array.reshape(-1)
    if datatype.name == "BYTES":
        return _join_bytes(flat)
    return np.ascontiguousarray(flat, dtype=datatype.dtype).view(np.uint8).data


def _join_bytes(elements: np.ndarray) -> bytes:
    parts: list[bytes] = []
    for element in elements:
        data = element.encode() if isinstance(element, str) else element
        parts += (_LENGTH_PREFIX.pack(len(data)), data)
    return b"".join(parts)


def encode_infer_response(response: InferResponse) -> bytes:
    """A serialized ModelInferResponse; tensors always raw, as tritonclient reads most datatypes only so."""
    message = pb.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )
    raw = []
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=tensor.array.shape)
        raw.append(encode_tensor(tensor.datatype, tensor.array))
    return append_raw_contents(message.SerializeToString(), raw)
