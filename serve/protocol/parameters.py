"""InferParameter maps: of a request, of its tensors, and of a response.

Rules: Open Inference Protocol, "Parameters"; Triton's sequence, scheduling and shared-memory extensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.errors import InvalidArgumentError, UnsupportedError
from serve.request import SharedArea

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve.request import Parameter

_PARAMETER_TYPES = {
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}
_ANY_OTHER = ("bool_param", "int64_param", "string_param", "double_param")
_REGION, _OFFSET, _BYTE_SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"
_INT64_MAX = 2**63 - 1
_LONGEST_SEQUENCE_ID = 128  # bytes, as in Triton


def decode_parameters(parameters: Any) -> dict[str, Parameter]:
    """A request's parameters with their types; those of the protocol's extensions are checked.

    Raises:
        InvalidArgumentError: a parameter has another type than its extension says, no value, or a reserved
            name.
        UnsupportedError: a sequence id is too long.
    """
    decoded: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        allowed = _PARAMETER_TYPES.get(name)
        if allowed is None:
            if name.startswith("triton_"):
                raise InvalidArgumentError(f"parameter '{name}': names that start with triton_ are reserved")
            allowed = _ANY_OTHER
        if choice not in allowed:
            raise InvalidArgumentError(
                f"parameter '{name}': expected {' or '.join(allowed)}, got {choice or 'none'}"
            )
        decoded[name] = getattr(parameter, choice)
    sequence_id = decoded.get("sequence_id", 0)
    if isinstance(sequence_id, str) and (size := len(sequence_id.encode())) > _LONGEST_SEQUENCE_ID:
        raise UnsupportedError(
            f"parameter 'sequence_id' has {size} bytes, expected {_LONGEST_SEQUENCE_ID} at most"
        )
    priority = decoded.get("priority", 0)
    if isinstance(priority, int) and priority < 0:
        raise InvalidArgumentError(f"parameter 'priority': expected 0 or more, got {priority}")
    return decoded


def decode_shared_area(role: str, tensor: Any) -> SharedArea | None:
    """Where an input or requested output says that its bytes are in shared memory; None: it doesn't.

    Args:
        role: "input" or "output", for messages.
        tensor: InferInputTensor or InferRequestedOutputTensor, with parameters.

    Raises:
        InvalidArgumentError: a shared-memory parameter is missing, negative or of another type.
    """
    parameters = tensor.parameters
    if _REGION not in parameters:
        for name in (_OFFSET, _BYTE_SIZE):
            if name in parameters:
                raise InvalidArgumentError(f"{role} '{tensor.name}': {name} is there without {_REGION}")
        return None
    region = parameters[_REGION]
    if region.WhichOneof("parameter_choice") != "string_param":
        raise InvalidArgumentError(f"{role} '{tensor.name}': {_REGION} must be a string_param")
    if _BYTE_SIZE not in parameters:
        raise InvalidArgumentError(f"{role} '{tensor.name}': {_BYTE_SIZE} is missing beside {_REGION}")
    byte_size = _byte_count(role, tensor, _BYTE_SIZE)
    offset = _byte_count(role, tensor, _OFFSET) if _OFFSET in parameters else 0
    return SharedArea(region.string_param, offset, byte_size)


def _byte_count(role: str, tensor: Any, name: str) -> int:
    parameter = tensor.parameters[name]
    if parameter.WhichOneof("parameter_choice") != "int64_param" or parameter.int64_param < 0:
        raise InvalidArgumentError(f"{role} '{tensor.name}': {name} must be an int64_param, 0 or more")
    count: int = parameter.int64_param
    return count


def decode_classification(output: Any) -> int:
    """How many top classes a requested output with parameters wants; 0: the tensor itself.

    Raises:
        InvalidArgumentError: the parameter is no count, or the output is wanted in shared memory, too.
    """
    if "classification" not in output.parameters:
        return 0
    parameter = output.parameters["classification"]
    if parameter.WhichOneof("parameter_choice") != "int64_param" or parameter.int64_param <= 0:
        raise InvalidArgumentError(f"output '{output.name}': classification must be an int64_param above 0")
    if _REGION in output.parameters:
        raise InvalidArgumentError(f"output '{output.name}': classification and {_REGION} exclude each other")
    count: int = parameter.int64_param
    return count


def encode_parameters(parameters: Mapping[str, Parameter], target: Any) -> None:
    """Put parameters into a message's map, each with the type that it has in Python."""
    for name, value in parameters.items():
        parameter = target[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            setattr(parameter, "int64_param" if value <= _INT64_MAX else "uint64_param", value)
        elif isinstance(value, float):
            parameter.double_param = value
        else:
            parameter.string_param = value


def encode_shared_area(area: SharedArea, byte_size: int, target: Any) -> None:
    """Say in a response output's parameters where its `byte_size` bytes are."""
    encode_parameters({_REGION: area.region, _BYTE_SIZE: byte_size}, target)
    if area.offset:
        encode_parameters({_OFFSET: area.offset}, target)
