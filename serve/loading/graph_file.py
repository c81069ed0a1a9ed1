"""What an ONNX file holds that must be known before it is loaded: its operators and its side files.

The file is protobuf, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; only messages that can hold a
node or a tensor are looked into, and tensors' bytes are skipped, so a file of any size costs what its nodes
cost. It is read, not mapped: a mapped file that another process cuts short ends the reader with SIGBUS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, ModelLoadError
from serve.protocol.wire import read_varint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

DYNAMIC_QUANTIZATION = frozenset(
    {"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
)
"""Operators that stand for activation ranges found at run time, over all rows of a batch."""

# By message, field number to the message in it: all ways from a model to a node or a tensor.
_INSIDE = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {4: "op_type", 5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalData"},
}  # fmt: skip
_KEY, _VALUE = 1, 2  # of an entry of external_data

_WINDOW_BYTES = 1 << 16
_LONGEST_HEADER = 20  # two varints: tag and length
_LONGEST_NAME = 4096  # PATH_MAX
# A model of a thousand million numbers has some 100 000 fields; a forest of trees may have millions. Past
# this a file only costs time, about 10 s.
_MAX_FIELDS = 10_000_000

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True, slots=True)
class GraphFile:
    """What a graph file says of itself.

    Attributes:
        operators: operator types of all nodes, those of subgraphs and functions too.
        external_data: where tensors outside the file are, as the file has it, unchecked.
    """

    operators: frozenset[str]
    external_data: tuple[str, ...]

    @property
    def quantizes_dynamically(self) -> bool:
        """Whether a row's answer may depend on the other rows of its batch through their common range."""
        return not self.operators.isdisjoint(DYNAMIC_QUANTIZATION)


def read_graph_file(path: Path) -> GraphFile:
    """Look through a graph file without loading it.

    onnxruntime takes a file that ends in `.ort` for its own format, which has neither these operators to see
    nor tensors elsewhere.

    Raises:
        ModelLoadError: it can't be read, or is no ONNX model.
    """
    if path.suffix == ".ort":
        return GraphFile(frozenset(), ())
    if not path.is_file():  # a pipe would be waited for
        raise ModelLoadError(f"{path.name} is missing, or no file")
    try:
        with path.open("rb") as stream:
            return _Walk(stream, path.stat().st_size).read()
    except (_MalformedError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path.name} is no ONNX model: {error}; export it again") from error
    except InvalidArgumentError as error:  # from `read_varint`, whose text is about requests
        raise ModelLoadError(f"{path.name} is no ONNX model: a number has no end; export it again") from error
    except OSError as error:
        raise ModelLoadError(f"{path.name} can't be read: {error.strerror}") from error


def check_external_data(path: Path, graph: GraphFile) -> None:
    """Hold each tensor file of a graph to the graph's own folder, before onnxruntime opens it.

    onnxruntime refuses paths that lead out of it, but follows a hard link, by which a file of another folder
    is in this one too.

    Raises:
        ModelLoadError: a location is no plain relative path to a file inside the folder.
    """
    folder = path.parent.resolve()
    for location in graph.external_data:
        problem = _problem(folder, location)
        if problem:
            raise ModelLoadError(
                f"{path.name}: its tensors in {location!r} can't be used: {problem}; expected a plain file "
                "beside the graph: export it again, or into one file"
            )


def external_data(path: Path) -> list[str]:
    """The files beside a graph that hold tensors of it, checked, each once.

    Raises:
        ModelLoadError: as `read_graph_file` and `check_external_data`.
    """
    graph = read_graph_file(path)
    check_external_data(path, graph)
    return list(graph.external_data)


def _problem(folder: Path, location: str) -> str:
    """Why a location is not acceptable, or ""."""
    parts = location.split("/")
    if not location or "\0" in location or "\\" in location or location.startswith("/"):
        return "no relative path"
    if any(part in ("", "..") for part in parts):
        return "no plain path"
    at = folder
    for part in parts:
        at /= part
        if at.is_symlink():
            return "a symbolic link"
    if not at.is_file():
        return "no such file"
    if at.stat().st_nlink > 1:
        return "it has a second name elsewhere (a hard link); copy it"
    return ""


class _MalformedError(ValueError):
    """The bytes are no ONNX model."""


class _Walk:
    """Goes through the messages of a file without recursion: what is still to do is on a list."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._window, self._window_start = b"", 0
        self._fields_left = _MAX_FIELDS
        self._operators: set[str] = set()
        self._locations: dict[str, None] = {}
        self._todo = [("Model", 0, size)]

    def read(self) -> GraphFile:
        """Go through all of it."""
        if not self._size:
            raise _MalformedError("the file is empty")
        found_graph = False
        while self._todo:
            message, start, end = self._todo.pop()
            found_graph |= message == "Graph"
            self._look_into(message, start, end)
        if not found_graph:
            raise _MalformedError("there is no graph in it")
        return GraphFile(frozenset(self._operators), tuple(self._locations))

    def _look_into(self, message: str, start: int, end: int) -> None:
        inside = _INSIDE[message]
        found = []
        for number, content, content_end in self._fields(start, end):
            kind = inside.get(number)
            if kind == "op_type":
                self._operators.add(self._text(content, content_end))
            elif kind == "ExternalData":
                self._add_location(content, content_end)
            elif kind is not None:
                found.append((kind, content, content_end))
        self._todo += reversed(found)  # in the file's order, for the window's sake

    def _add_location(self, start: int, end: int) -> None:
        entry = {
            number: self._text(content, content_end)
            for number, content, content_end in self._fields(start, end)
            if number in (_KEY, _VALUE)
        }
        if entry.get(_KEY) == "location":
            self._locations[entry.get(_VALUE, "")] = None

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, begin and end of the content of each length-delimited field of a message."""
        position = start
        while position < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _MalformedError(f"it has over {_MAX_FIELDS} fields")
            window, base = self._at(position)
            tag, offset = read_varint(window, position - base)
            kind = tag & 7
            if kind == _LENGTH_DELIMITED:
                length, offset = read_varint(window, offset)
                content = base + offset
                position = content + length
                if position <= end:
                    yield tag >> 3, content, position
            elif kind == _VARINT:
                _, offset = read_varint(window, offset)
                position = base + offset
            elif kind in _FIXED_BYTES:
                position = base + offset + _FIXED_BYTES[kind]
            else:
                raise _MalformedError(f"wire type {kind} at byte {position}")
        if position != end:
            raise _MalformedError(f"a field ends at byte {position}, what it belongs to at byte {end}")

    def _at(self, position: int) -> tuple[bytes, int]:
        """Bytes of the file that hold the header of the field at `position`, and where they begin in it."""
        offset = position - self._window_start
        if offset < 0 or offset + _LONGEST_HEADER > len(self._window):
            self._stream.seek(position)
            self._window, self._window_start = self._stream.read(_WINDOW_BYTES), position
        return self._window, self._window_start

    def _text(self, start: int, end: int) -> str:
        if end - start > _LONGEST_NAME:
            raise _MalformedError(f"a name of {end - start} bytes at byte {start}")
        window, base = self._at(start)
        if end - base > len(window):
            self._stream.seek(start)
            return self._stream.read(end - start).decode()
        return window[start - base : end - base].decode()
