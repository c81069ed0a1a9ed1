"""Instance threads: a thin shell of locks around a scheduler."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from serve.errors import CanceledError, RetiredError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serve.errors import ServeError
    from serve.scheduling.scheduler import Decision, QueuedRequest, Scheduler

logger = logging.getLogger(__name__)

_SECONDS_AFTER_A_FAULT = 0.1


class Executor:
    """Runs what a scheduler gives out, at most `instances` runs at once.

    A caller whose thread has nothing else to do may lend it (`inline`): when an instance is free and nothing
    waits, its request runs there at once, which saves two context switches. What can't run at once waits for
    an instance thread.
    """

    def __init__(
        self,
        name: str,
        instances: int,
        scheduler: Scheduler,
        run: Callable[[Sequence[QueuedRequest]], None],
        drop: Callable[[QueuedRequest, ServeError], None],
    ) -> None:
        """Start the instance threads.

        Args:
            name: prefix of the threads' names.
            instances: runs at once, at least 1.
            scheduler: decides what runs; called under this object's lock alone.
            run: answers a batch; settles each future and raises nothing.
            drop: settles a request that needs no run any more.
        """
        self._instances = instances
        self._scheduler = scheduler
        self._run = run
        self._drop = drop
        # The lock itself on the hot path: entering it through the condition is a Python call more each time.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._running = 0
        self._reserved = 0
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

    def reserve(self) -> None:
        """Announce a request that is submitted later: `close` waits for it.

        Raises:
            RetiredError: `close` was called.
        """
        with self._lock:
            if self._closed:
                raise RetiredError
            self._reserved += 1

    def unreserve(self) -> None:
        """The request that was announced has been submitted, or won't be."""
        with self._lock:
            self._reserved -= 1
            if self._closed:
                self._wake.notify_all()

    def submit(self, queued: QueuedRequest, *, inline: bool) -> None:
        """Run a request now on this thread, if `inline` and an instance is free, else leave it to be run.

        Raises:
            RetiredError: `close` was called.
            UnavailableError, InvalidArgumentError: the scheduler doesn't take it.
        """
        with self._lock:
            if self._closed and not self._reserved:
                raise RetiredError
            scheduler = self._scheduler
            if (
                inline
                and scheduler.immediate
                and self._running < self._instances
                and not len(scheduler)
                and not queued.request.parameters  # a queue may have to look at them
            ):
                self._running += 1
            else:
                scheduler.enqueue(queued, time.monotonic())
                queued.call.leave_queue = lambda: self._leave(queued)
                self._wake.notify()
                return
        self._run_and_release([queued])

    def close(self) -> None:
        """Run what waits, then end the threads; returns when nothing runs any more."""
        with self._wake:
            self._closed = True
            self._wake.wait_for(lambda: not self._reserved)
            self._scheduler.drain()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        with self._wake:  # threads that were lent
            self._wake.wait_for(lambda: not self._running)

    def _leave(self, queued: QueuedRequest) -> None:
        """Take a cancelled request out of the queue."""
        with self._lock:
            waited = self._scheduler.remove(queued)
            self._wake.notify()  # what waits behind it in a sequence is to be dropped
        if waited:
            reason = CanceledError("the request was cancelled while it waited")
            self._drop(queued, reason)

    def _run_and_release(self, batch: Sequence[QueuedRequest]) -> None:
        try:
            self._run(batch)
        finally:
            with self._lock:
                self._running -= 1
                self._scheduler.finished(batch, time.monotonic())
                if self._closed:
                    self._wake.notify_all()
                elif len(self._scheduler):
                    self._wake.notify()

    def _work(self) -> None:
        goes_on = True
        while goes_on:
            try:
                goes_on = self._take_turn()
            except Exception:
                # A fault of the scheduler's; without this thread every later request would hang.
                logger.exception("scheduling failed in an unforeseen way")
                time.sleep(_SECONDS_AFTER_A_FAULT)

    def _take_turn(self) -> bool:
        """Do what is next; False: closed, and nothing waits. Keeps no reference to what it did."""
        decision = self._next()
        if decision is None:
            return False
        for queued, reason in decision.dropped:
            self._drop(queued, reason)
        if decision.batch:
            self._run_and_release(decision.batch)
        return True

    def _next(self) -> Decision | None:
        """Wait until there is something to run or to drop; None: closed, and nothing waits."""
        with self._wake:
            while True:
                timeout = None
                if self._running < self._instances:
                    now = time.monotonic()
                    decision = self._scheduler.next(now)
                    self._running += bool(decision.batch)
                    if decision.batch or decision.dropped:
                        if len(self._scheduler) and self._running < self._instances:
                            # What is left may have a time of its own, which a free thread must know.
                            self._wake.notify()
                        return decision
                    if decision.wake_at is not None:
                        timeout = max(0.0, decision.wake_at - now)
                if self._closed and not len(self._scheduler):
                    # Those that wait for a run to end would not be told otherwise.
                    self._wake.notify_all()
                    return None
                self._wake.wait(timeout)
