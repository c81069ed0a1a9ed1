"""Traces as JSON files, as Triton writes them and its trace_summary.py reads them.

A file is one list; after each batch it is complete, so that what a killed server wrote can be read.
Format: https://docs.nvidia.com/deeplearning/triton-inference-server, user guide, "JSON Trace Output".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from serve.observability.tracing import TensorSample, TraceRecord

_MAX_BYTES = 1 << 30


class TraceFile:
    """One file for all traces, or numbered ones of `log_frequency` traces each."""

    def __init__(self, path: str, max_bytes: int = _MAX_BYTES) -> None:
        """Open nothing yet.

        Args:
            path: the file, or what the numbered ones' names begin with.
            max_bytes: written to all of them together; what comes then is lost.
        """
        self._path = path
        self._bytes_left = max_bytes
        self._lists: dict[int, _JsonList] = {}
        self._next_number = 0

    def write(self, records: Sequence[TraceRecord]) -> None:
        """Add traces.

        Raises:
            OSError: a file can't be written, or `max_bytes` are.
        """
        for record in records:
            text = ",".join(json.dumps(entry, separators=(",", ":")) for entry in entries(record))
            self._bytes_left -= len(text)
            if self._bytes_left < 0:
                raise OSError(f"{self._path}: the traces have reached their limit")
            self._list_for(record.log_frequency).add(text)
        for file in self._lists.values():
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._lists.values():
            file.close()
        self._lists.clear()

    def _list_for(self, log_frequency: int) -> _JsonList:
        found = self._lists.get(log_frequency)
        if found is not None and not (log_frequency and found.length >= log_frequency):
            return found
        if found is not None:
            found.close()
        path = f"{self._path}.{self._next_number}" if log_frequency else self._path
        self._lists[log_frequency] = _JsonList(path)
        self._next_number += bool(log_frequency)
        return self._lists[log_frequency]


class _JsonList:
    """A JSON list that grows, and is whole after each `flush`."""

    def __init__(self, path: str) -> None:
        self.length = 0
        self._file: TextIO = Path(path).open("w", encoding="ascii")  # noqa: SIM115 - held until close
        self._end = self._file.write("[")

    def add(self, text: str) -> None:
        self._file.seek(self._end)
        self._end += self._file.write(f",{text}" if self.length else text)
        self.length += 1

    def flush(self) -> None:
        self._file.seek(self._end)
        self._file.write("]")
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()


def entries(record: TraceRecord) -> Iterator[dict[str, Any]]:
    """The objects that one trace is in Triton's format."""
    head: dict[str, Any] = {
        "id": record.id,
        "model_name": record.model_name,
        "model_version": record.model_version,
    }
    if record.request_id:
        head["request_id"] = record.request_id
    yield head
    for name, nanoseconds in record.stamps:
        yield {"id": record.id, "timestamps": [{"name": name, "ns": nanoseconds}]}
    for sample in record.tensors:
        tensor = {
            "name": sample.name,
            "data": _data(sample),
            "shape": ",".join(map(str, sample.shape)),
            "dtype": sample.datatype,
        }
        yield {"id": record.id, "activity": sample.activity, "tensor": tensor}


def _data(sample: TensorSample) -> str:
    """The values as Triton writes them; nothing for FP16 and BF16, as there."""
    if sample.datatype in {"FP16", "BF16"}:
        return ""
    if sample.datatype == "BYTES":
        return ",".join(f'"{value.decode(errors="backslashreplace")}"' for value in sample.values)
    if sample.datatype == "BOOL":
        return ",".join("1" if value else "0" for value in sample.values)
    return ",".join(map(str, sample.values))
