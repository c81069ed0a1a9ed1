"""How many requests, of how many bytes, may be in the server at once, and when the last has left."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from serve.cgroups import MOUNT, OWN, cgroup_folders
from serve.errors import UnavailableError
from serve.observability.occasionally import Occasionally

logger = logging.getLogger(__name__)

_SHARE = 8  # of the memory that the server may use, for messages
_LEAST_BUDGET = 64 << 20
_MEMORY_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}
_NO_LIMIT = 1 << 62  # version 1 writes a number past this, version 2 "max"


class Admission:
    """Counts requests from their receipt until their answer is on the wire, a stream's until it is made.

    A bound here keeps goodput at capacity under overload: with an unbounded queue it falls to 10 %, because
    the server works for clients that have already given up.
    """

    def __init__(self, limit: int, byte_limit: int = 0) -> None:
        """Let in at most `limit` requests of together `byte_limit` bytes; 0: `default_byte_limit()`."""
        self._limit = limit
        self._byte_limit = byte_limit or default_byte_limit()
        self._inside = 0
        self._bytes = 0
        self._refused = 0
        self._closed = False
        self._occasionally = Occasionally(logger)
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)

    @property
    def closed(self) -> bool:
        """Whether new requests are refused because the server stops."""
        return self._closed

    @property
    def inflight(self) -> int:
        """How many requests are inside."""
        return self._inside

    @property
    def inflight_bytes(self) -> int:
        """Bytes of the requests inside."""
        return self._bytes

    @property
    def refused(self) -> int:
        """How many requests were not let in, so far."""
        return self._refused

    def enter(self, size: int = 0) -> None:
        """Let a request of `size` bytes in; alone, it may be larger than the budget.

        Raises:
            UnavailableError: the server stops, or it is full.
        """
        with self._lock:
            problem = self._problem(size)
            if not problem:
                self._inside += 1
                self._bytes += size
                return
            self._refused += 1
        if not self._closed:
            self._occasionally.warn(f"refused a request: {problem}")
        raise UnavailableError(problem)

    def _problem(self, size: int) -> str:
        """Why a request of `size` bytes can't be let in; empty: it can."""
        if self._closed:
            return "the server is shutting down and has stopped accepting new requests"
        if self._inside >= self._limit:
            return (
                f"{self._limit} requests are in flight, the server's limit (--max-inflight-requests): "
                "retry later or on another server"
            )
        if self._inside and self._bytes + size > self._byte_limit:
            return (
                f"the requests in flight have {self._bytes} bytes, this one {size}, the limit is "
                f"{self._byte_limit} (--max-inflight-bytes): retry later or on another server"
            )
        return ""

    def leave(self, size: int = 0) -> None:
        """A request that was let in, with the same `size`, is through."""
        with self._lock:
            self._inside -= 1
            self._bytes -= size
            if self._closed and not self._inside:
                self._empty.notify_all()

    def close(self, timeout: float) -> bool:
        """Refuse new requests and wait until those inside are through, `timeout` seconds at most."""
        with self._empty:
            self._closed = True
            return self._empty.wait_for(lambda: not self._inside, timeout)


def default_byte_limit() -> int:
    """An eighth of the memory that this process may use, 64 MiB at least.

    A message is in memory twice at most, as it came and as it goes.
    """
    return max(_LEAST_BUDGET, memory_limit() // _SHARE)


def memory_limit(cgroup: Path = MOUNT, own: Path = OWN, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process may use: what its cgroups grant, or the machine's memory; 0: unknown.

    Args:
        cgroup: where the cgroups are mounted.
        own: which of them the process is in, one line `hierarchy:controllers:path` each.
        meminfo: the machine's.
    """
    limits: list[int] = []
    for version, folder in cgroup_folders("memory", cgroup, own):
        with contextlib.suppress(OSError, ValueError):  # "max", or no limit here
            limits.append(int((folder / _MEMORY_FILES[version]).read_text()))
    limits = [limit for limit in limits if limit < _NO_LIMIT]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        total = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:"))
        limits.append(int(total.split()[1]) * 1024)
    return min(limits, default=0)
