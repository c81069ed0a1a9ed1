"""Lines and traces on their way to a file, written by a thread of their own.

Whoever has something to write never waits: it goes into a bounded queue, and what doesn't fit is dropped and
counted. The thread sleeps between batches, so that a busy server isn't woken for each line.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)

_BATCH_SECONDS = 0.05
_CLOSE_SECONDS = 5.0
_REPORT_SECONDS = 10.0


class Sink(Protocol[Item_contra]):
    """Where items end up; used by one thread only."""

    def write(self, items: Sequence[Item_contra], /) -> None:
        """Write a batch; an OSError means that it is lost."""

    def close(self) -> None:
        """Nothing follows."""


class WriteBehind(Generic[Item]):
    """A bounded queue before a sink, and the thread between them."""

    def __init__(self, what: str, sink: Sink[Item], limit: int) -> None:
        """Start the thread.

        Args:
            what: the items in plural, for the thread's name and for the log.
            sink: where they go.
            limit: how many may wait.
        """
        self._what = what
        self._sink = sink
        self._limit = limit
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._dropped = self._reported = 0
        self._report_at = 0.0
        self._problem: Exception | None = None
        self._arrived, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many were lost: they didn't fit into the queue, or couldn't be written."""
        return self._dropped

    def put(self, item: Item) -> None:
        """Have an item written soon, or drop it."""
        if self._queue.qsize() >= self._limit or self._closing.is_set():
            self._drop(1)
            return
        self._queue.put(item)
        if not self._arrived.is_set():
            self._arrived.set()

    def close(self) -> None:
        """Write what waits, close the sink, end the thread; gives up after some seconds."""
        self._closing.set()
        self._arrived.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s: not all could be written within %g s", self._what, _CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._arrived.wait()
            self._closing.wait(_BATCH_SECONDS)
            self._arrived.clear()
            self._write()
            self._report()
        self._write()
        self._sink.close()

    def _write(self) -> None:
        items = [self._queue.get() for _ in range(self._queue.qsize())]
        if not items:
            return
        try:
            self._sink.write(items)
        except Exception as error:  # noqa: BLE001 - a full disk or a sink's mistake must not end the thread
            self._problem = error
            self._drop(len(items))

    def _drop(self, count: int) -> None:
        with self._lock:
            self._dropped += count

    def _report(self) -> None:
        now = time.monotonic()
        if self._dropped > self._reported and now >= self._report_at:
            why = self._problem or f"more than {self._limit} waited"
            logger.warning("%s: %d lost: %s", self._what, self._dropped - self._reported, why)
            self._problem = None
            self._reported, self._report_at = self._dropped, now + _REPORT_SECONDS
