"""Tensors as they are on the wire: random ones, texts, numbers."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from serve.pb import grpc_service_pb2 as pb

_FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_INTEGERS = {
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
}
NUMBERS = {**_FLOATS, **_INTEGERS, "BOOL": "u1"}
# Indices into a vocabulary or a set of classes are the usual integers; small ones are legal for most models.
INTEGER_END = 32


class RequestError(Exception):
    """A model can't be asked what was asked for; the message says why."""


def add_tensor(request: pb.ModelInferRequest, tensor: Any, shape: list[int], raw: bytes) -> None:
    """Add an input with its content."""
    request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    request.raw_input_contents.append(raw)


def random_tensor(random: np.random.Generator, tensor: Any, count: int) -> bytes:
    """So many elements of an input's datatype, as they are on the wire.

    Raises:
        RequestError: the datatype is none that this can make.
    """
    if tensor.datatype in _FLOATS:
        return random.random(count).astype(_FLOATS[tensor.datatype]).tobytes()
    if tensor.datatype == "UINT8":
        return random.bytes(count)
    if tensor.datatype in _INTEGERS:
        return random.integers(0, INTEGER_END, count).astype(_INTEGERS[tensor.datatype]).tobytes()
    if tensor.datatype == "BOOL":
        return random.integers(0, 2, count).astype("u1").tobytes()
    if tensor.datatype == "BF16":
        return random.random(count).astype("<f4").view("<u2")[1::2].tobytes()
    if tensor.datatype == "BYTES":
        return text_element(b"text") * count
    raise RequestError(f"input '{tensor.name}': no random tensor for datatype {tensor.datatype}")


def text_element(content: bytes) -> bytes:
    """An element of a BYTES tensor."""
    return struct.pack("<I", len(content)) + content
