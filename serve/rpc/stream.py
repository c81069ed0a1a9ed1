"""The open ModelStreamInfer streams: how many there may be, and how they end when the server stops."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from serve.errors import UnavailableError
from serve.rpc.infer_stream import InferStream
from serve.rpc.pending_answer import Unwritten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serve.core import InferenceCore


# How often to look for streams whose clients don't read.
WATCH_SECONDS = 1.0


def _nothing() -> None:
    pass


class Streams:
    """Opens streams, up to a limit.

    Attributes:
        unwritten: the answers that the streams' clients have yet to take.
    """

    def __init__(self, limit: int, byte_limit: int = 0) -> None:
        """Open at most `limit`; `byte_limit` is that of `unwritten`."""
        self.unwritten = Unwritten(byte_limit)
        self._limit = limit
        self._watched = False
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
        cancel: Callable[[], object] = _nothing,
    ) -> InferStream:
        """Open a stream; the transport must `close` it when the RPC is over.

        Args:
            core: what answers the requests.
            deadline: each request's, on the `time.monotonic` clock in seconds.
            peer: the client's address.
            metadata: the RPC's.
            cancel: ends the RPC, also while the transport waits for the client to read.

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
            stream = InferStream(core, self._leave, cancel, deadline, peer=peer, metadata=metadata)
            self._open.add(stream)
            if not self._watched:
                threading.Thread(target=self._watch, name="stream-watch", daemon=True).start()
                self._watched = True
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

    def _watch(self) -> None:
        """End the streams whose clients don't read, while any is open."""
        while True:
            time.sleep(WATCH_SECONDS)
            with self._changed:
                streams = list(self._open)
                if not streams:
                    self._watched = False
                    return
            for stream in streams:
                stream.end_if_stuck()

    def _leave(self, stream: InferStream) -> None:
        with self._changed:
            self._open.discard(stream)
            self._changed.notify_all()
