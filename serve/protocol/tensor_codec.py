"""A tensor's bytes on the wire to numpy and back.

Rules: Open Inference Protocol, "Tensor Data"; Triton's binary tensor data extension.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.protocol.datatypes import DataType

Buffer = bytes | memoryview

_LENGTH_PREFIX = struct.Struct("<I")
# numpy's own limit. The product of 131072 dimensions took 1.5 s, and time grows with their square.
MAX_DIMENSIONS = 64
# An element is an object of some 50 bytes in Python, another in onnxruntime, two more in the answer: 11 M
# of 2 bytes each, 62 MiB, took 860 MB and 5 s for the decoding alone. Real requests have thousands of texts.
MAX_BYTES_ELEMENTS = 1 << 20
_CONTENTS_DTYPES = {"int_contents": np.dtype("<i4"), "uint_contents": np.dtype("<u4")}


def element_count(name: str, shape: tuple[int, ...]) -> int:
    """Product of the dimensions.

    Raises:
        InvalidArgumentError: a dimension is negative, or there are more than `MAX_DIMENSIONS`.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidArgumentError(
            f"input '{name}': shape can't be served: expected {MAX_DIMENSIONS} dimensions at most, got "
            f"{len(shape)}"
        )
    if shape and min(shape) < 0:
        raise InvalidArgumentError(f"input '{name}': shape {list(shape)} has a negative dimension")
    return math.prod(shape)


def decode_tensor(name: str, datatype: DataType, shape: tuple[int, ...], raw: Buffer) -> np.ndarray:
    """Raw bytes as an array of `shape`: little-endian, row-major, a view except for BYTES.

    Raises:
        InvalidArgumentError: the byte count does not fit the shape, or BYTES elements are malformed.
    """
    count = check_byte_size(name, datatype, shape, len(raw))
    if datatype.name == "BYTES":
        return _reshape(name, _object_array(_split_bytes(name, raw, count)), shape)
    return _reshape(name, np.frombuffer(raw, datatype.dtype), shape)


def check_byte_size(name: str, datatype: DataType, shape: tuple[int, ...], byte_size: int) -> int:
    """The element count of a tensor that has `byte_size` bytes.

    Raises:
        InvalidArgumentError: the shape can't be, needs another number of bytes, or too many BYTES elements.
    """
    count = element_count(name, shape)
    if not datatype.itemsize:
        _check_bytes_count(name, count, byte_size)
    elif byte_size != count * datatype.itemsize:
        raise InvalidArgumentError(
            f"input '{name}': expected {count * datatype.itemsize} bytes for {datatype.name} {list(shape)}, "
            f"got {byte_size}"
        )
    return count


def _check_bytes_count(name: str, count: int, byte_size: int) -> None:
    """Refuse a BYTES tensor for its shape, before any of its elements is made."""
    least = count * _LENGTH_PREFIX.size
    if byte_size < least:
        raise InvalidArgumentError(
            f"input '{name}': expected {count} BYTES elements for its shape, at least {least} bytes, got "
            f"{byte_size} bytes"
        )
    check_bytes_limit(name, count)


def check_bytes_limit(name: str, count: int) -> None:
    """Refuse an input with which a request has `count` BYTES elements, too many of them.

    Raises:
        InvalidArgumentError: they are more than `MAX_BYTES_ELEMENTS`.
    """
    if count > MAX_BYTES_ELEMENTS:
        raise InvalidArgumentError(
            f"input '{name}': expected {MAX_BYTES_ELEMENTS} BYTES elements at most, got {count}: split the "
            "request"
        )


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
        check_bytes_limit(name, count)
    # np.array would make a list of Python objects first.
    wide = np.fromiter(values, _CONTENTS_DTYPES.get(datatype.contents, datatype.dtype), count)
    return _reshape(name, wide.astype(datatype.dtype, copy=False), shape)


def as_text(elements: np.ndarray) -> np.ndarray:
    """An array of `bytes` as onnxruntime takes it: of `str`.

    Raises:
        UnicodeDecodeError: an element is not UTF-8, the only text that a graph's string tensor holds.
    """
    texts = np.empty(elements.size, dtype=object)
    texts[:] = [element.decode() for element in elements.flat]
    return texts.reshape(elements.shape)


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
