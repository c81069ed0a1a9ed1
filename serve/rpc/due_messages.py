"""Which of a stream's messages may be written, in which order. Pure: its owner locks it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from serve.errors import ServeError

if TYPE_CHECKING:
    from serve.request import InferResponse
    from serve.rpc.pending_answer import PendingAnswer

Due = tuple["PendingAnswer", "InferResponse | None"]
"""A message of a request: an answer before its last one, or None: the last one, which is its outcome."""


class DueMessages:
    """The requests of one stream until their last message is written.

    Requests to models that answer once are answered in the order in which they came; a decoupled model's
    answers are due as soon as they are there. Neither waits for the other, and what is due is written first
    come, first served.
    """

    def __init__(self) -> None:
        self._open: set[PendingAnswer] = set()
        self._in_turn: deque[PendingAnswer] = deque()
        self._due: deque[Due] = deque()

    def __len__(self) -> int:
        """How many requests are open."""
        return len(self._open)

    @property
    def unwritten(self) -> int:
        """How many messages are due."""
        return len(self._due)

    def open(self, pending: PendingAnswer) -> None:
        """A request was taken."""
        self._open.add(pending)

    def submitted(self, pending: PendingAnswer) -> bool:
        """It has an outcome, perhaps a future one; whether that makes a message due.

        Called in the order in which the requests came.
        """
        if pending not in self._open:
            return False
        if not pending.decoupled:
            self._in_turn.append(pending)
            return self._turn()
        if isinstance(pending.outcome, ServeError):
            self._due.append((pending, None))
            return True
        return False

    def emitted(self, pending: PendingAnswer, response: InferResponse) -> bool:
        """Its model answered, and will answer again; whether anybody still wants to know."""
        if pending not in self._open or pending.settled:
            return False
        self._due.append((pending, response))
        return True

    def settled(self, pending: PendingAnswer) -> bool:
        """Its future is done; whether that makes a message due."""
        if not pending.decoupled:
            return self._turn()
        self._due.append((pending, None))
        return True

    def next(self) -> Due | None:
        """Take the message that is to be written now; None: none is due."""
        self._turn()
        while self._due:
            due = self._due.popleft()
            if due[0] in self._open:
                return due
        return None

    def close(self, pending: PendingAnswer) -> bool:
        """The last message is written, or nobody wants more of it; False if it was closed already."""
        if pending not in self._open:
            return False
        self._open.remove(pending)
        return True

    def close_all(self, but: PendingAnswer | None) -> list[PendingAnswer]:
        """Close all requests but one; which they are."""
        closed = [pending for pending in self._open if pending is not but]
        self._open.difference_update(closed)
        self._in_turn.clear()
        self._due.clear()
        return closed

    def _turn(self) -> bool:
        """Whether the first ones of those that wait for their turn have it now."""
        waiting = self._in_turn
        if not waiting or not waiting[0].settled:
            return False
        while waiting and waiting[0].settled:
            self._due.append((waiting.popleft(), None))
        return True
