"""The access log: one JSON object a line for each request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from serve.observability.write_behind import WriteBehind
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.request import Call

STDERR = "-"
_LIMIT = 8192
# Clients choose names, ids and parts of messages; a line stays short whatever they send.
_LONGEST_TEXT = 256


@dataclass(slots=True)
class AccessRecord:
    """One request, when its answer has left.

    Attributes:
        method: the RPC's name.
        code: name of the gRPC status that it was answered with.
        error: the message of that status; empty where it is OK.
        model, version, request_id: as the client gave them, the version as served where it was.
        peer: the client's address, as the transport names it.
        request_bytes, response_bytes: sizes of the messages.
        call: the request's times and rows.
        ended_ns: `time.monotonic_ns()` when the answer had left.
    """

    method: str
    call: Call
    peer: str
    request_bytes: int
    code: str = "CANCELLED"
    error: str = ""
    model: str = ""
    version: str = ""
    request_id: str = ""
    response_bytes: int = 0
    ended_ns: int = 0


class AccessLog:
    """Takes records from any thread without ever making it wait."""

    def __init__(self, target: str) -> None:
        """Open the file, or stderr for `-`, and start the thread that writes.

        Raises:
            SettingsError: the file can't be opened for writing.
        """
        self._sink = _Lines(target)
        self._writer = WriteBehind("access log lines", self._sink, _LIMIT)

    @property
    def dropped(self) -> int:
        """How many lines were lost because they came faster than they could be written."""
        return self._writer.dropped

    def record(self, record: AccessRecord) -> None:
        """Write a line about a request that is over."""
        self._writer.put(record)

    def reopen(self) -> None:
        """Open the file again before the next line, as after its rotation."""
        self._sink.reopen = True

    def close(self) -> None:
        """Write what waits and close the file."""
        self._writer.close()


class _Lines:
    """The file; opened again when asked to, and when the path has come to mean another file."""

    def __init__(self, target: str) -> None:
        self.reopen = False
        self._path = target
        self._file: TextIO
        try:
            self._open()
        except OSError as error:
            raise SettingsError(
                f"--access-log {target} can't be written: {error.strerror or error}; name a file in a folder "
                "that exists, or - for stderr"
            ) from error

    def write(self, records: Sequence[AccessRecord]) -> None:
        # Should the path be unusable now, the lines go on into the file that is open.
        with contextlib.suppress(OSError):
            if self.reopen or self._moved():
                self.reopen = False
                old = self._file
                self._open()
                if old is not sys.stderr:
                    old.close()
        clock_offset = time.time_ns() - time.monotonic_ns()
        self._file.write("".join(line(record, clock_offset) for record in records))
        self._file.flush()

    def close(self) -> None:
        if self._file is not sys.stderr:
            self._file.close()

    def _open(self) -> None:
        if self._path == STDERR:
            self._file = sys.stderr
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._file = os.fdopen(descriptor, "a", encoding="ascii")

    def _moved(self) -> bool:
        if self._path == STDERR:
            return False
        try:
            there = os.stat(self._path)  # noqa: PTH116 - beside fstat, which has no Path
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(self._file.fileno()))


def line(record: AccessRecord, clock_offset: int) -> str:
    """One line of the log.

    Args:
        record: the request.
        clock_offset: nanoseconds from `time.monotonic_ns` to `time.time_ns`.
    """
    call = record.call
    entry: dict[str, Any] = {
        "time": _utc(call.received_ns + clock_offset),
        "method": record.method,
        "model": _cut(record.model),
        "version": _cut(record.version),
        "id": _cut(record.request_id),
        "code": record.code,
        "ms": _milliseconds(record.ended_ns - call.received_ns),
        "queue_ms": _milliseconds(call.started_ns - call.queued_ns) if call.started_ns else 0.0,
        "compute_ms": _milliseconds(call.done_ns - call.started_ns) if call.done_ns else 0.0,
        "request_bytes": record.request_bytes,
        "response_bytes": record.response_bytes,
        "rows": call.rows,
        "peer": _cut(record.peer),
    }
    if record.error:
        entry["error"] = _cut(record.error)
    # ASCII only, so that no newline, terminal sequence or separator of another alphabet gets into the file.
    return json.dumps(entry, ensure_ascii=True, separators=(",", ":")) + "\n"


def _utc(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03d}Z"


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
