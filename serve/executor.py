"""Instance threads: a thin shell of locks around the scheduler."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from serve.scheduler import DefaultScheduler, QueuedRequest

if TYPE_CHECKING:
    from collections.abc import Callable


class Executor:
    """Runs a model version's requests, at most `instances` at once, in order of arrival.

    A caller whose thread has nothing else to do may lend it (`inline`): when an instance is free its request
    runs there at once, which saves two context switches. What can't run at once waits for an instance thread.
    """

    def __init__(
        self,
        name: str,
        instances: int,
        run: Callable[[QueuedRequest], None],
        drop: Callable[[QueuedRequest], None],
    ) -> None:
        """Start the instance threads.

        Args:
            name: prefix of the threads' names.
            instances: runs at once, at least 1.
            run: answers a request; settles its future and raises nothing.
            drop: settles a request that was cancelled or expired while it waited.
        """
        self._instances = instances
        self._run = run
        self._drop = drop
        self._scheduler = DefaultScheduler()
        # The lock itself on the hot path: entering it through the condition is a Python call more each time.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._running = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """How many requests wait for an instance."""
        return len(self._scheduler)

    def submit(self, queued: QueuedRequest, *, inline: bool) -> None:
        """Run a request now on this thread, if `inline` and an instance is free, else leave it to be run."""
        with self._lock:
            if inline and self._running < self._instances and not self._scheduler:
                self._running += 1
            else:
                self._scheduler.enqueue(queued)
                self._wake.notify()
                return
        self._run_and_release(queued)

    def close(self) -> None:
        """Run what waits, then end the threads; returns when they have ended."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _run_and_release(self, queued: QueuedRequest) -> None:
        try:
            self._run(queued)
        finally:
            with self._lock:
                self._running -= 1
                if self._scheduler:
                    self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._scheduler or self._running >= self._instances:
                    if self._closed and not self._scheduler:
                        return
                    self._wake.wait()
                decision = self._scheduler.next(time.monotonic())
                self._running += decision.run is not None
            for dropped in decision.dropped:
                self._drop(dropped)
            if decision.run is not None:
                self._run_and_release(decision.run)
