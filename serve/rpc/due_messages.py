"""Which of a stream's messages may be written, in which order, and who waits for what until then."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING

from serve.errors import ServeError, UnavailableError

if TYPE_CHECKING:
    from serve.request import InferResponse
    from serve.rpc.pending_answer import PendingAnswer, Unwritten

# Requests of one stream that are read but not answered; then the client has to wait, too.
MAX_PENDING = 32

Due = tuple["PendingAnswer", "InferResponse | None"]
"""A message of a request: an answer before its last one, or None: the last one, which is its outcome."""


class DueMessages:
    """The requests of one stream until their last message is written.

    Requests to models that answer once are answered in the order in which they came; a decoupled model's
    answers are due as soon as they are there. Neither waits for the other, and what is due is written first
    come, first served.

    The stream's reader calls `wait_for_room`, `take` and `submitted`, its transport's thread `next` and
    `end`, the models' threads `emit` and `settled`.
    """

    def __init__(self, unwritten: Unwritten) -> None:
        """`unwritten`: while it is full, no request is to be taken beside another."""
        self._all_unwritten = unwritten
        self._open: set[PendingAnswer] = set()
        self._submitting: PendingAnswer | None = None
        self._in_turn: deque[PendingAnswer] = deque()
        self._due: deque[Due] = deque()
        self._reading = True
        self._draining = False
        self._closed = False
        self._crowded = False  # the reader waits for room
        self._idle = False  # the transport's thread waits for a message, or is about to
        self._wake: SimpleQueue[None] = SimpleQueue()  # a third of a condition's cost, and no lock
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)

    @property
    def unwritten(self) -> int:
        """How many messages are due."""
        return len(self._due)

    def drain(self) -> None:
        """Take no more requests; `next` raises when those that are open have ended."""
        self._draining = True
        self._wake_up()

    def end_of_requests(self) -> None:
        """There won't be any more; `next` returns None when those that are open have ended."""
        self._reading = False
        self._wake_up()

    def close(self) -> list[PendingAnswer]:
        """Nobody wants the messages any more; the requests that have to be given up, each only once."""
        with self._lock:
            self._closed = True
            abandoned = [pending for pending in self._open if pending is not self._submitting]
            self._open.difference_update(abandoned)
            self._in_turn.clear()
            self._due.clear()
            self._room.notify_all()
        self._wake_up()
        return abandoned

    # The reader's thread

    def wait_for_room(self) -> bool:
        """Wait while enough is pending, or the server stops; False when no more are to be read."""
        if self._full():
            with self._room:
                self._crowded = True
                while self._full() and not self._closed:
                    self._room.wait()
                self._crowded = False
        return not self._closed

    def _full(self) -> bool:
        pending = len(self._open)
        return self._draining or pending >= MAX_PENDING or (pending > 0 and self._all_unwritten.full)

    def take(self, pending: PendingAnswer) -> bool:
        """A request has arrived: the stream doesn't end before its last message; False: it comes too late."""
        with self._lock:
            if self._closed:
                return False
            self._open.add(pending)
            self._submitting = pending
            return True

    def submitted(self, pending: PendingAnswer) -> bool:
        """It has an outcome, perhaps a future one; False: it has to be given up, the stream was closed."""
        with self._lock:
            self._submitting = None
            if self._closed:
                return not self._end(pending)
            if not pending.decoupled:
                self._in_turn.append(pending)
            elif isinstance(pending.outcome, ServeError):
                self._due.append((pending, None))
        if pending.settled:
            self._wake_up()
        return True

    # The models' threads

    def emit(self, pending: PendingAnswer, response: InferResponse) -> None:
        """A decoupled model has answered, and will answer again; waits for nobody."""
        with self._lock:
            if pending not in self._open or pending.settled:
                return  # nobody wants to know
            self._due.append((pending, response))
            pending.emitted(response)
        self._wake_up()

    def settled(self, pending: PendingAnswer) -> None:
        """A request's last answer is there: see `serve.rpc.pending_answer.Listener`."""
        if pending.decoupled:
            with self._lock:
                self._due.append((pending, None))
        self._wake_up()

    def _wake_up(self) -> None:
        """Have the transport's thread look what is due; called after the change."""
        if self._idle:
            self._idle = False
            self._wake.put(None)

    # The transport's thread

    def next(self) -> Due | None:
        """Wait for the message that is to be written now; None: there won't be any.

        Raises:
            UnavailableError: the server stops, and nothing waits for an answer.
        """
        while True:
            with self._lock:
                self._idle = True  # said before it looks: whatever changes later wakes it up
                due = self._next()
                if due is not None or self._over():
                    self._idle = False
                    return due
            self._wake.get()

    def _next(self) -> Due | None:
        in_turn = self._in_turn
        while in_turn and in_turn[0].settled:
            self._due.append((in_turn.popleft(), None))
        while self._due:
            due = self._due.popleft()
            if due[0] in self._open:
                return due
        return None

    def _over(self) -> bool:
        if self._closed or self._open:
            return self._closed
        if self._reading and self._draining:
            self._closed = True
            raise UnavailableError("the server is shutting down: go on with another stream")
        return not self._reading

    def end(self, pending: PendingAnswer) -> bool:
        """A request's last message is written, or nobody wants more of it; False: it was given up before."""
        with self._lock:
            ended = self._end(pending)
            if self._crowded:
                self._room.notify_all()
            return ended

    def _end(self, pending: PendingAnswer) -> bool:
        if pending not in self._open:
            return False
        self._open.remove(pending)
        return True
