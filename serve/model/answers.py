"""Answers to those who wait for them: at once, or in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING

from serve.errors import ServeError
from serve.scheduling.batcher import InOrder

if TYPE_CHECKING:
    from serve.request import InferResponse
    from serve.scheduling.scheduler import QueuedRequest

    Answer = InferResponse | ServeError


def give(future: Future[InferResponse], answer: Answer) -> None:
    """Settle a future; one that was given up stays as it is."""
    try:
        if isinstance(answer, ServeError):
            # The frames of the traceback hold the request, which holds the future, which holds this.
            answer.__traceback__ = answer.__cause__ = answer.__context__ = None
            future.set_exception(answer)
        else:
            future.set_result(answer)
    except InvalidStateError:
        pass


class OrderedAnswers:
    """Answers in the order in which their requests were expected, from any thread."""

    def __init__(self) -> None:
        self._in_order = InOrder()
        self._lock = threading.RLock()
        self._released: deque[tuple[QueuedRequest, Answer]] = deque()
        self._releasing = False

    def expect(self, queued: QueuedRequest) -> None:
        """A request whose answer goes out behind those of all that came before."""
        with self._lock:
            self._in_order.expect(queued)

    def give(self, queued: QueuedRequest, answer: Answer) -> None:
        """Settle a request, and those whose answers waited for it, once all before it are settled."""
        with self._lock:
            self._released.extend(self._in_order.finish(queued, answer))
            if self._releasing:  # further up on this thread's stack, in a callback of a future: it goes on
                return
            self._releasing = True
            try:
                while self._released:
                    ready, its_answer = self._released.popleft()
                    give(ready.future, its_answer)
            finally:
                self._releasing = False
