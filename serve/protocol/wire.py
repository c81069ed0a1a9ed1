"""Protobuf's wire format where the generated code would copy tensors: the top level of an infer message.

The Python protobuf runtime copies each bytes field once when it parses and again when it is read, and
likewise on the way out. `raw_input_contents` and `raw_output_contents` hold whole tensors, so they are sliced
out of and spliced into the message here; everything small stays with protobuf. Format: protobuf's encoding
guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RAW_INPUT_TAG = 7 << 3 | 2
RAW_OUTPUT_TAG = bytes([6 << 3 | 2])
STREAM_RESPONSE_TAG = bytes([2 << 3 | 2])
# Real requests have tens of top-level fields; 4 MB of empty submessages would expand to 177 MB when parsed.
MAX_FIELDS = 4096
# What isn't raw expands up to 25-fold when it is parsed: 8 MiB of zeros as int64_contents take 198 MiB and
# 0.3 s, 61 MiB took 2.1 GB and stopped everybody for 5 s. An image as fp32_contents has 600 KB.
MAX_HEAD_BYTES = 8 << 20

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_VARINT_MAX_BYTES = 10


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The varint at `position` and the position behind it.

    Raises:
        InvalidArgumentError: it runs past the end of the message or past 10 bytes.
    """
    value = shift = 0
    for position_of_byte in range(position, min(position + _VARINT_MAX_BYTES, len(data))):
        byte = data[position_of_byte]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the continuation bit
            return value, position_of_byte + 1
        shift += 7
    raise InvalidArgumentError(f"malformed request: no varint ends at byte {position} of {len(data)}")


def write_varint(value: int) -> bytes:
    """A non-negative integer as a varint."""
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def split_raw_contents(data: bytes) -> tuple[bytes, list[memoryview]]:
    """Take the raw tensors out of a serialized ModelInferRequest without copying them.

    Returns:
        the message without its `raw_input_contents`, and these as views on `data`.

    Raises:
        InvalidArgumentError: the top level is no valid message, has over `MAX_FIELDS` fields, or more than
            `MAX_HEAD_BYTES` beside the raw tensors.
    """
    view = memoryview(data)
    head: list[memoryview] = []
    raw: list[memoryview] = []
    kept_from = kept = 0
    for tag, position, start, end in _fields(data):
        if tag == RAW_INPUT_TAG:
            raw.append(view[start:end])
            head.append(view[kept_from:position])
            kept += position - kept_from
            kept_from = end
    kept += len(data) - kept_from
    if kept > MAX_HEAD_BYTES:
        raise InvalidArgumentError(
            f"request has {kept} bytes beside raw_input_contents, expected {MAX_HEAD_BYTES} at most: send "
            "tensors as raw_input_contents"
        )
    head.append(view[kept_from:])
    return b"".join(head), raw


def check_fields(data: bytes) -> None:
    """Check a message's top level, for one whose parsing is to be bounded by `MAX_FIELDS`.

    Raises:
        InvalidArgumentError: the top level is no valid message, or has over `MAX_FIELDS` fields.
    """
    for _ in _fields(data):
        pass


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Each top-level field: its tag, and where it, its content and the next field begin."""
    position = fields = 0
    while position < len(data):
        fields += 1
        if fields > MAX_FIELDS:
            raise InvalidArgumentError(f"request has over {MAX_FIELDS} top-level fields; split it")
        tag, content = read_varint(data, position)
        start, end = _content_bounds(data, tag, content)
        yield tag, position, start, end
        position = end


def _content_bounds(data: bytes, tag: int, position: int) -> tuple[int, int]:
    """Where the content of the field whose tag ends at `position` begins and ends."""
    wire_type = tag & 7
    start = position
    if wire_type == _LENGTH_DELIMITED:
        length, start = read_varint(data, position)
        end = start + length
    elif wire_type == _VARINT:
        _, end = read_varint(data, position)
    elif wire_type == _FIXED64:
        end = position + 8
    elif wire_type == _FIXED32:
        end = position + 4
    else:
        raise InvalidArgumentError(f"malformed request: wire type {wire_type} before byte {position}")
    if end > len(data):
        raise InvalidArgumentError(
            f"malformed request: a field ends at byte {end} of a message of {len(data)} bytes"
        )
    return start, end


def append_raw_contents(head: bytes, raw: Sequence[bytes | memoryview], *, wrapped_in: bytes = b"") -> bytes:
    """A serialized ModelInferResponse from one without raw contents, and these; one copy of each tensor.

    Fields 1 to 5 come first in `head`, so the result is byte for byte what protobuf itself would write.

    Args:
        head: the message without its `raw_output_contents`.
        raw: these.
        wrapped_in: tag of the field of an outer message that is to hold this one alone; empty: none.
    """
    parts: list[bytes | memoryview] = [head]
    for tensor in raw:
        parts += (RAW_OUTPUT_TAG, write_varint(len(tensor)), tensor)
    if wrapped_in:
        parts[:0] = (wrapped_in, write_varint(sum(map(len, parts))))
    return b"".join(parts)
