"""A stream's request until its answer is written, and what it holds of the server until then."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from serve.admission import default_byte_limit

if TYPE_CHECKING:
    from concurrent.futures import Future

    from serve.admission import Admission
    from serve.errors import ServeError
    from serve.observability.observation import Observed
    from serve.request import Call, InferResponse


class Unwritten:
    """Bytes of the answers, of all streams together, that clients have yet to take."""

    def __init__(self, limit: int = 0) -> None:
        """`limit` bytes are enough; 0: `default_byte_limit()`."""
        self._limit = limit or default_byte_limit()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        """Whether a stream that has answers to write should take no more requests."""
        return self._bytes >= self._limit

    def add(self, size: int) -> None:
        """Count `size` bytes; below 0: they are gone."""
        with self._lock:
            self._bytes += size


class PendingAnswer:
    """A request that is to be answered.

    It has a place in the server until its model is done with it, not until the client has read the answer:
    clients that read nothing would keep everybody else out.

    Attributes:
        id: the client's name for it.
        call: its deadline and cancellation.
        outcome: where its answer will be, or why it is refused.
        observed: what its trace and the access log learn of it; None where both are off.
    """

    __slots__ = ("_held", "call", "id", "observed", "outcome")

    def __init__(self, call: Call, admission: Admission, unwritten: Unwritten) -> None:
        self.id = ""
        self.call = call
        self.outcome: Future[InferResponse] | ServeError
        self.observed: Observed | None = None
        self._held = _Held(admission, unwritten)

    def enter(self, size: int) -> None:
        """Take a place in the server, for a request of `size` bytes.

        Raises:
            UnavailableError: the server stops, or it is full.
        """
        self._held.enter(size)

    def refuse(self, error: ServeError) -> None:
        """No model is going to answer: this is why."""
        self.outcome = error
        self._held.answered(0)

    def expect(self, future: Future[InferResponse]) -> None:
        """A model is going to answer."""
        self.outcome = future
        # The future keeps its callbacks: one of this object's would make a cycle, with an answer in it.
        future.add_done_callback(self._held.done)

    def end(self) -> None:
        """The answer is written, or nobody wants it any more; may be called again."""
        self._held.end()
        if self.observed is not None:
            self.observed.finish()


class _Held:
    """What a request holds: a place in the server, then memory for its answer."""

    __slots__ = ("_admission", "_lock", "_over", "_request_bytes", "_unwritten", "_unwritten_bytes")

    def __init__(self, admission: Admission, unwritten: Unwritten) -> None:
        self._admission = admission
        self._unwritten = unwritten
        self._request_bytes: int | None = None  # as admission counts them; None: no place
        self._unwritten_bytes = 0
        self._over = False
        self._lock = threading.Lock()

    def enter(self, size: int) -> None:
        self._admission.enter(size)
        self._request_bytes = size

    def done(self, future: Future[InferResponse]) -> None:
        has_answer = not future.cancelled() and future.exception() is None
        self.answered(_message_bytes(future.result()) if has_answer else 0)

    def answered(self, size: int) -> None:
        with self._lock:
            self._leave()
            if not self._over:
                self._unwritten_bytes = size
                self._unwritten.add(size)

    def end(self) -> None:
        with self._lock:
            self._leave()
            if not self._over:
                self._over = True
                self._unwritten.add(-self._unwritten_bytes)

    def _leave(self) -> None:
        if self._request_bytes is not None:
            self._admission.leave(self._request_bytes)
            self._request_bytes = None


def _message_bytes(response: InferResponse) -> int:
    """Bytes of the tensors that go into the message; of BYTES tensors those of the elements' addresses."""
    return sum(tensor.array.nbytes for tensor in response.outputs if tensor.shared_memory is None)
