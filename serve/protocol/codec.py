"""Infer messages to requests and back: every refusal is an `InvalidArgumentError`.

Rules: Open Inference Protocol, "Tensor Data"; Triton's binary tensor data and shared-memory extensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from serve.errors import InternalError, InvalidArgumentError
from serve.pb import grpc_service_pb2 as pb
from serve.protocol.datatypes import DATATYPES
from serve.protocol.parameters import (
    decode_classification,
    decode_parameters,
    decode_shared_area,
    encode_parameters,
    encode_shared_area,
)
from serve.protocol.tensor_codec import (
    Buffer,
    check_bytes_limit,
    decode_contents,
    decode_tensor,
    encode_tensor,
)
from serve.protocol.wire import STREAM_RESPONSE_TAG, append_raw_contents, check_fields, split_raw_contents
from serve.request import InferRequest, InferResponse, RequestedOutput, SharedInput, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.message import Message

    from serve.request import Parameter

# Below this protobuf's own copies cost less than walking the fields in Python.
SPLIT_FROM_BYTES = 16 * 1024
FINAL_RESPONSE = "triton_final_response"
"""Parameter of a stream's answers: whether it is its request's last one."""
_NO_PARAMETERS: Mapping[str, Parameter] = {}


def parse(message_type: type[Message]) -> Callable[[bytes], Any]:
    """A parser of one message type whose failures are `InvalidArgumentError`s."""

    def parse_message(data: bytes) -> Any:
        try:
            return message_type.FromString(data)
        except DecodeError as error:
            raise InvalidArgumentError(f"malformed {message_type.DESCRIPTOR.name}: {error}") from error

    return parse_message


def parse_bounded(message_type: type[Message]) -> Callable[[bytes], Any]:
    """The same for a message that may be large: of `wire.MAX_FIELDS` top-level fields at most."""
    parse_message = parse(message_type)

    def check_and_parse(data: bytes) -> Any:
        check_fields(data)
        return parse_message(data)

    return check_and_parse


_parse_infer_request = parse(pb.ModelInferRequest)


def decode_infer_request(data: bytes) -> InferRequest:
    """A serialized ModelInferRequest; arrays of fixed-size elements are read-only views on `data`.

    Raises:
        InvalidArgumentError: the message or a tensor in it is malformed.
    """
    message, raw = _split(data)
    inputs, shared_inputs = _decode_inputs(message.inputs, raw)
    return InferRequest(
        message.model_name,
        message.model_version,
        inputs,
        tuple(map(_decode_requested_output, message.outputs)),
        message.id,
        decode_parameters(message.parameters) if message.parameters else _NO_PARAMETERS,
        shared_inputs,
    )


def request_id(data: bytes) -> str:
    """The id of a request that can't be decoded, as far as it can be read; else ""."""
    try:
        identity: str = _split(data)[0].id
    except InvalidArgumentError:
        return ""
    return identity


def _split(data: bytes) -> tuple[Any, Sequence[Buffer]]:
    """The message, and its raw tensors."""
    if len(data) < SPLIT_FROM_BYTES:
        message = _parse_infer_request(data)
        return message, message.raw_input_contents
    head, raw = split_raw_contents(data)
    return _parse_infer_request(head), raw


def _decode_inputs(
    inputs: Sequence[Any], raw: Sequence[Buffer]
) -> tuple[tuple[Tensor, ...], tuple[SharedInput, ...]]:
    """The inputs, apart from those in shared memory, which use up no entry of `raw`, and these."""
    tensors = []
    shared = []
    slot = bytes_elements = 0
    for tensor in inputs:
        datatype = DATATYPES.get(tensor.datatype)
        if datatype is None:
            raise InvalidArgumentError(
                f"input '{tensor.name}': datatype {tensor.datatype!r} is not one of {', '.join(DATATYPES)}"
            )
        shape = tuple(tensor.shape)
        if tensor.parameters:
            area = decode_shared_area("input", tensor)
            if area is not None:
                _refuse_contents(tensor, "its bytes in shared memory")
                shared.append(SharedInput(tensor.name, datatype, shape, area))
                continue
        if raw:
            _refuse_contents(tensor, "raw_input_contents")
        if slot < len(raw):
            array = decode_tensor(tensor.name, datatype, shape, raw[slot])
            slot += 1
        elif tensor.HasField("contents"):
            array = decode_contents(tensor.name, datatype, shape, tensor.contents)
        else:
            raise InvalidArgumentError(
                f"unable to find data for input '{tensor.name}': "
                f"neither raw_input_contents[{slot}] nor contents is there"
            )
        if datatype.name == "BYTES":
            bytes_elements += array.size
            check_bytes_limit(tensor.name, bytes_elements)
        tensors.append(Tensor(tensor.name, datatype, array))
    return tuple(tensors), tuple(shared)


def _refuse_contents(tensor: Any, beside: str) -> None:
    if tensor.HasField("contents"):
        raise InvalidArgumentError(
            f"input '{tensor.name}' has typed contents beside {beside}: send all inputs in the same form"
        )


def _decode_requested_output(output: Any) -> RequestedOutput:
    if not output.parameters:
        return RequestedOutput(output.name)
    return RequestedOutput(output.name, decode_classification(output), decode_shared_area("output", output))


def encode_infer_response(response: InferResponse) -> bytes:
    """A serialized ModelInferResponse; tensors always raw, as tritonclient reads most datatypes only so.

    Raises:
        InvalidArgumentError: a tensor doesn't fit where the client wants it in shared memory.
    """
    return append_raw_contents(*_encode(response))


def encode_stream_response(response: InferResponse) -> bytes:
    """The same as a ModelStreamInferResponse; the last one for its request, unless its parameters deny it."""
    head, raw = _encode(response, streamed=True)
    return append_raw_contents(head, raw, wrapped_in=STREAM_RESPONSE_TAG)


def encode_stream_error(identity: str, text: str, failed_model: str = "") -> bytes:
    """A serialized ModelStreamInferResponse that says why the request with this id failed.

    Args:
        identity: the request's id.
        text: why.
        failed_model: the model that had taken the request; "": none had, it was refused.
    """
    # An empty text would make it a success.
    message = pb.ModelStreamInferResponse(error_message=text or "unknown error")
    message.infer_response.id = identity
    if failed_model:
        message.infer_response.model_name = failed_model
        message.infer_response.parameters[FINAL_RESPONSE].bool_param = True
    return message.SerializeToString()


def _encode(response: InferResponse, *, streamed: bool = False) -> tuple[bytes, list[Buffer]]:
    message = pb.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )
    if response.parameters:
        encode_parameters(response.parameters, message.parameters)
    if streamed and FINAL_RESPONSE not in response.parameters:
        message.parameters[FINAL_RESPONSE].bool_param = True
    raw: list[Buffer] = []
    for tensor in response.outputs:
        output = message.outputs.add(
            name=tensor.name, datatype=tensor.datatype.name, shape=tensor.array.shape
        )
        data = encode_tensor(tensor.datatype, tensor.array)
        if tensor.shared_memory is not None:
            data = _put(tensor, data, output)
        raw.append(data)
    return message.SerializeToString(), raw


def _put(tensor: Tensor, data: Buffer, output: Any) -> Buffer:
    """Write a tensor's bytes where the client wants them; what is left for the message: nothing."""
    area = tensor.shared_memory
    assert area is not None
    assert area.memory is not None
    if len(data) > area.byte_size:
        raise InternalError(  # Triton's code for it
            f"output '{tensor.name}' has {len(data)} bytes, shared_memory_byte_size is {area.byte_size}"
        )
    area.memory.write(area.offset, data)
    encode_shared_area(area, len(data), output.parameters)
    return b""
