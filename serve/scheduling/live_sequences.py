"""The sequences of one model that are alive: who has a slot, who waits, who is idle, who has expired.

How a sequence ends early, as in Triton:
- It has had no request for `max_idle`: it loses its slot and its state, and its id is unknown from then on.
  Unlike Triton, whose clock starts when a request arrives, ours starts when the last one has been answered.
- A request of it is cancelled or expires before its answer: those before it still run, those after it are
  answered CANCELLED, as they would run on a wrong state. A START among them begins anew.
- A request waits in the backlog longer than its parameter `timeout`: all its requests get UNAVAILABLE.
A run that fails leaves the sequence as it was before that run: the client may send the request again.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve.errors import CanceledError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from serve.errors import ServeError
    from serve.scheduling.scheduler import QueuedRequest
    from serve.scheduling.sequence_config import SequenceSettings


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence between its START and the answer to its END.

    Attributes:
        id: the correlation id; once the sequence is not open another one may have the same.
        state_shape: the sizes of its state that may differ between sequences.
        state: what `serve.model.implicit_state` keeps for it; None: what a sequence starts with.
        queue: its requests that wait, in order.
        open: further requests may come.
        has_slot: its requests may run; otherwise it waits in the backlog.
        running: one of its requests runs.
        idle_since: when the last one was answered, seconds.
        expires: when it has waited too long in the backlog, seconds.
    """

    id: int | str
    state_shape: Hashable
    state: Any = None
    queue: deque[QueuedRequest] = field(default_factory=deque)
    open: bool = True
    has_slot: bool = False
    running: bool = False
    idle_since: float = 0.0
    expires: float = math.inf


@dataclass(slots=True, eq=False)
class SequenceStep:
    """A request's place in its sequence; `QueuedRequest.sequence`.

    Attributes:
        sequence: the one that it belongs to.
        start: it is the first one.
        end: it is the last one.
        arrived: when it was enqueued, seconds.
    """

    sequence: LiveSequence
    start: bool = False
    end: bool = False
    arrived: float = 0.0


class LiveSequences:
    """The table of them. A sequence has a slot and is ready, idle or running, or it is in the backlog.

    Attributes:
        count: sequences alive.
        waiting: requests queued in all of them.
        ready: those whose next request may run, the longest ready first.
        dropped: requests that need no run any more, not yet taken.
    """

    def __init__(self, settings: SequenceSettings) -> None:
        self.count = 0
        self.waiting = 0
        # Dicts for their order and their quick removal.
        self.ready: dict[LiveSequence, None] = {}
        self.dropped: list[tuple[QueuedRequest, ServeError]] = []
        self._settings = settings
        self._max_idle = settings.max_idle
        self._draining = False
        self._open: dict[int | str, LiveSequence] = {}
        self._backlog: dict[LiveSequence, None] = {}
        self._idle: dict[LiveSequence, None] = {}
        self._free_slots = settings.slots
        self._backlog_expiry = math.inf  # no later than the first one's

    def find(self, name: int | str) -> LiveSequence | None:
        """The sequence that a request with this id belongs to."""
        return self._open.get(name)

    def begin(self, name: int | str, model: str) -> LiveSequence:
        """A new sequence, with a slot if one is free; its first request must be appended next.

        Raises:
            UnavailableError: there are as many as there may be, or the model is being unloaded.
        """
        if self._draining:
            raise UnavailableError(f"model '{model}' is being unloaded, it begins no sequence any more")
        if self.count >= self._settings.max_live:
            raise UnavailableError(
                f"model '{model}' has {self.count} live sequences, the most that it may have: "
                "retry when one has ended, or raise --max-live-sequences"
            )
        sequence = self._open[name] = LiveSequence(name, self._settings.first_state_shape)
        self.count += 1
        if self._free_slots:
            self._free_slots -= 1
            sequence.has_slot = True
        else:
            self._backlog[sequence] = None
        return sequence

    def append(self, queued: QueuedRequest, timeout: float) -> None:
        """Queue a request in its sequence; `timeout`, seconds, limits its time in the backlog if above 0."""
        step: SequenceStep = queued.sequence
        sequence = step.sequence
        sequence.queue.append(queued)
        self.waiting += 1
        if step.end:
            self._close(sequence)
        if timeout > 0 and not sequence.has_slot:
            sequence.expires = min(sequence.expires, step.arrived + timeout)
            self._backlog_expiry = min(self._backlog_expiry, sequence.expires)
        self.settle(sequence)

    def take(self, sequence: LiveSequence) -> QueuedRequest:
        """The next request of a ready sequence, which is to run now."""
        del self.ready[sequence]
        sequence.running = True
        self.waiting -= 1
        queued = sequence.queue.popleft()
        if queued.sequence.start:
            sequence.state, sequence.state_shape = None, self._settings.first_state_shape
        return queued

    def answered(self, sequence: LiveSequence, now: float, *, given_up: bool) -> None:
        """The request that was taken has its answer, or its client gave it up."""
        sequence.running = False
        sequence.idle_since = now
        if given_up:
            self._break_off(sequence, 0)
        self.settle(sequence)

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a waiting request out and drop those that depend on it; whether it waited."""
        sequence: LiveSequence = queued.sequence.sequence
        try:
            position = sequence.queue.index(queued)
        except ValueError:
            return False
        del sequence.queue[position]
        self.waiting -= 1
        self._break_off(sequence, position)
        self.settle(sequence)
        return True

    def drop_first(self, sequence: LiveSequence, reason: ServeError) -> None:
        """Drop a sequence's next request and those that depend on it."""
        self._drop(sequence.queue.popleft(), reason)
        self._break_off(sequence, 0)
        self.settle(sequence)

    def settle(self, sequence: LiveSequence) -> None:
        """Put a sequence that has changed where it belongs."""
        if not sequence.has_slot:
            if not sequence.queue:
                del self._backlog[sequence]
                self.count -= 1
            return
        self._idle.pop(sequence, None)
        if sequence.running:
            return
        if sequence.queue:
            self.ready[sequence] = None  # keeps its place where it has one
            return
        self.ready.pop(sequence, None)
        if sequence.open:
            self._idle[sequence] = None
        else:
            self._release(sequence)

    def expire(self, now: float) -> None:
        """End the sequences whose time is over."""
        if now >= self._backlog_expiry:
            self._expire_backlog(now)
        while self._idle:
            sequence = next(iter(self._idle))
            if sequence.idle_since + self._max_idle > now:
                break
            del self._idle[sequence]
            self._close(sequence)
            self._release(sequence)

    def next_expiry(self) -> float:
        """When `expire` has something to do again at the earliest, seconds; infinity: never."""
        idle = next(iter(self._idle)).idle_since + self._max_idle if self._idle else math.inf
        return min(idle, self._backlog_expiry if self._backlog else math.inf)

    def drain(self) -> None:
        """No sequence begins any more, and one that would wait for its next request ends instead."""
        self._draining = True
        self._max_idle = -math.inf

    def _close(self, sequence: LiveSequence) -> None:
        if sequence.open:
            sequence.open = False
            del self._open[sequence.id]

    def _release(self, sequence: LiveSequence) -> None:
        """Give an ended sequence's slot to the one that has waited longest in the backlog."""
        sequence.state = None
        self.count -= 1
        if not self._backlog:
            self._free_slots += 1
            return
        heir = next(iter(self._backlog))
        del self._backlog[heir]
        heir.has_slot = True
        self.settle(heir)

    def _break_off(self, sequence: LiveSequence, position: int) -> None:
        """Drop the requests from `position` on, which rest on one that is lost, up to the next START."""
        waiting = list(sequence.queue)
        restart = next((i for i in range(position, len(waiting)) if waiting[i].sequence.start), len(waiting))
        for queued in waiting[position:restart]:
            error = CanceledError(f"sequence {sequence.id} was ended: an earlier request of it was given up")
            self._drop(queued, error)
        sequence.queue = deque(waiting[:position] + waiting[restart:])
        if restart == len(waiting):
            self._close(sequence)

    def _drop(self, queued: QueuedRequest, error: ServeError) -> None:
        self.waiting -= 1
        self.dropped.append((queued, error))

    def _expire_backlog(self, now: float) -> None:
        self._backlog_expiry = math.inf
        for sequence in tuple(self._backlog):
            if sequence.expires > now:
                self._backlog_expiry = min(self._backlog_expiry, sequence.expires)
                continue
            while sequence.queue:
                error = UnavailableError("timeout of the corresponding sequence has been expired")
                self._drop(sequence.queue.popleft(), error)
            self._close(sequence)
            self.settle(sequence)
