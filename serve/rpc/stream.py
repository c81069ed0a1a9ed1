"""The open ModelStreamInfer streams: how many there may be, and how they end when the server stops."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from serve.errors import UnavailableError
from serve.rpc.infer_stream import InferStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.core import InferenceCore


class Streams:
    """Opens streams, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[InferStream] = set()
        self._draining = False
        self._changed = threading.Condition(threading.Lock())

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self,
        core: InferenceCore,
        deadline: float | None = None,
        peer: str = "",
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> InferStream:
        """Open a stream; the transport must `close` it when the RPC is over.

        Args:
            core: what answers the requests.
            deadline: each request's, on the `time.monotonic` clock in seconds.
            peer: the client's address.
            metadata: the RPC's.

        Raises:
            UnavailableError: the server stops, or too many are open.
        """
        with self._changed:
            if self._draining:
                raise UnavailableError("the server is shutting down and has stopped accepting new streams")
            if len(self._open) >= self._limit:
                raise UnavailableError(
                    f"{self._limit} streams are open, the server's limit (--max-streams): retry later or on "
                    "another server"
                )
            stream = InferStream(core, self._leave, deadline, peer, metadata)
            self._open.add(stream)
        return stream

    def drain(self) -> None:
        """Open no more streams, and have each one end once its requests are answered; returns at once."""
        with self._changed:
            self._draining = True
            streams = list(self._open)
        for stream in streams:
            stream.drain()

    def wait(self, timeout: float) -> bool:
        """Wait until every stream has ended, `timeout` seconds at most; whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def _leave(self, stream: InferStream) -> None:
        with self._changed:
            self._open.discard(stream)
            self._changed.notify_all()
