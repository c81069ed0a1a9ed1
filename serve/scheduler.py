"""Triton's default scheduler: which waiting request runs next. No tensors, threads or clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

    from serve.request import Call, InferRequest, InferResponse


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request with the future that its answer goes to."""

    request: InferRequest
    call: Call
    future: Future[InferResponse]


@dataclass(slots=True)
class Decision:
    """What to do now: run one request, if there is one, and settle those that need no run any more."""

    run: QueuedRequest | None = None
    dropped: list[QueuedRequest] = field(default_factory=list)


class DefaultScheduler:
    """First come, first served, one request a run; the dead are dropped before they cost anything."""

    def __init__(self) -> None:
        self._queue: deque[QueuedRequest] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def enqueue(self, queued: QueuedRequest) -> None:
        """Add a request at the end."""
        self._queue.append(queued)

    def next(self, now: float) -> Decision:
        """Take the first request that still wants an answer; `now` in seconds on the deadlines' clock."""
        decision = Decision()
        while self._queue:
            queued = self._queue.popleft()
            if queued.future.cancelled() or queued.call.expired(now):
                decision.dropped.append(queued)
            else:
                decision.run = queued
                break
        return decision
