"""What a scheduler is, and Triton's default one. No tensors, threads or clock of its own.

A scheduler decides which waiting requests make up the next run. Its methods are called under one lock, with
the clock passed in; `serve.scheduling.executor` is the shell of threads around it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from serve.errors import CanceledError, DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from concurrent.futures import Future

    from serve.errors import ServeError
    from serve.request import Call, InferRequest, InferResponse


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request with the future that its answer goes to.

    Attributes:
        request: decoded and checked against the model.
        call: its deadline and cancellation.
        future: where the answer goes.
        rows: its batch size; 1 for a model without a batch dimension.
        shape: requests make up a batch only where these are equal: the inputs' shapes without their rows.
        sequence: what the sequence scheduler knows of the sequence that it belongs to; None without one.
    """

    request: InferRequest
    call: Call
    future: Future[InferResponse]
    rows: int = 1
    shape: Hashable = ()
    sequence: Any = None


@dataclass(slots=True)
class Decision:
    """What to do now.

    Attributes:
        batch: requests to run together; empty: nothing is to be run now.
        dropped: requests that need no run any more, with the error that answers each.
        wake_at: when to ask again although nothing arrives, seconds on the clock of `now`; None: needn't.
    """

    batch: list[QueuedRequest] = field(default_factory=list)
    dropped: list[tuple[QueuedRequest, ServeError]] = field(default_factory=list)
    wake_at: float | None = None


class Scheduler(Protocol):
    """Decides what runs next."""

    immediate: bool
    """Whether a request that finds nothing waiting may run at once, without being enqueued."""

    def __len__(self) -> int:
        """How many requests wait."""

    def enqueue(self, queued: QueuedRequest, now: float) -> None:
        """Have a request wait.

        Raises:
            UnavailableError: the queue is full.
            InvalidArgumentError: the request can't be scheduled, such as one of no known sequence.
        """

    def next(self, now: float) -> Decision:
        """What to run now; asked when an instance is free, also after a removal, and when `wake_at` comes.

        After a batch it is to be asked again as long as an instance is free. `now` is in seconds on the
        deadlines' clock.
        """

    def finished(self, batch: Sequence[QueuedRequest], now: float) -> None:
        """A batch that `next` gave out has been answered."""

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a cancelled request out of the queue; whether it was there."""

    def drain(self) -> None:
        """No request comes any more: nothing that waits needs to wait for one."""


def drop_reason(queued: QueuedRequest, now: float) -> ServeError | None:
    """Why a request needs no run any more; None where it does."""
    if queued.future.cancelled():
        return CanceledError("the request was cancelled while it waited")
    if queued.call.expired(now):
        return DeadlineExceededError(
            f"model '{queued.request.model_name}': the request's deadline passed while it waited"
        )
    return None


class DefaultScheduler:
    """First come, first served, one request a run; the dead are dropped before they cost anything."""

    immediate = True

    def __init__(self) -> None:
        self._queue: deque[QueuedRequest] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def enqueue(self, queued: QueuedRequest, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Add a request at the end."""
        self._queue.append(queued)

    def next(self, now: float) -> Decision:
        """Take the first request that still wants an answer; `now` in seconds on the deadlines' clock."""
        decision = Decision()
        while self._queue and not decision.batch:
            queued = self._queue.popleft()
            reason = drop_reason(queued, now)
            if reason is None:
                decision.batch.append(queued)
            else:
                decision.dropped.append((queued, reason))
        return decision

    def finished(self, batch: Sequence[QueuedRequest], now: float) -> None:
        """Nothing depends on it."""

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a cancelled request out; whether it waited."""
        try:
            self._queue.remove(queued)
        except ValueError:
            return False
        return True

    def drain(self) -> None:
        """Nothing waits for another request here."""
