"""A stream's request until its last answer is written, and what it holds of the server until then."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Protocol

from serve.admission import default_byte_limit
from serve.errors import CanceledError, InternalError, ServeError
from serve.protocol import codec

if TYPE_CHECKING:
    import numpy as np

    from serve.admission import Admission
    from serve.observability.observation import Observed
    from serve.request import Call, InferResponse

logger = logging.getLogger(__name__)

STREAM_RPC = "ModelStreamInfer"
# Of an answer that waits to be written: its objects take more memory than a token's few bytes.
_EMITTED_BYTES = 1024


class Unwritten:
    """Bytes of the answers, of all streams together, that clients have yet to take."""

    def __init__(self, limit: int = 0) -> None:
        """`limit` bytes are enough; 0: `default_byte_limit()`."""
        self._limit = limit or default_byte_limit()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether a stream that has answers to write should take no more requests."""
        return self._bytes >= self._limit

    def add(self, size: int) -> None:
        """Count `size` bytes; below 0: they are gone."""
        with self._lock:
            self._bytes += size


class Listener(Protocol):
    """Whoever wants to know that a request is settled."""

    def settled(self, pending: PendingAnswer) -> None:
        """Its outcome is there. Called from the model's thread."""


class PendingAnswer:
    """A request that is to be answered.

    It has a place in the server until its model is done with it, not until the client has read the answer:
    clients that read nothing would keep everybody else out.

    Attributes:
        id: the client's name for it.
        call: its deadline and cancellation.
        decoupled: whether its model may answer more than once, and at any time.
        outcome: where its last answer will be, or why it is refused; None: its model hasn't taken it yet.
        observed: what its trace and the access log learn of it; None where both are off.
    """

    __slots__ = ("_held", "_model", "_sent_bytes", "call", "decoupled", "id", "observed", "outcome")

    def __init__(self, call: Call, admission: Admission, unwritten: Unwritten) -> None:
        self.id = ""
        self.call = call
        self.decoupled = False
        self.outcome: Future[InferResponse] | ServeError | None = None
        self._model = ""  # that took it
        self._sent_bytes = 0
        self.observed: Observed | None = None
        self._held = _Held(admission, unwritten)

    @property
    def settled(self) -> bool:
        """Whether its last answer, or what it failed of, is there."""
        return self._held.settled

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

    def expect(self, future: Future[InferResponse], model: str, listener: Listener) -> None:
        """A model is going to answer; the listener is told when it has, for the last time."""
        self.outcome = future
        self._model = model
        self._held.listener, self._held.pending = listener, self
        # The future keeps its callbacks: one of this object's would make a cycle, with an answer in it.
        future.add_done_callback(self._held.done)

    def message(self, emitted: InferResponse | None) -> bytes:
        """The bytes of an answer; None: of the last one.

        Raises:
            ServeError: the request failed, or the answer doesn't fit where the client wants it.
        """
        try:
            response = emitted or self._result()
            data = codec.encode_stream_response(response)
        except ServeError:
            raise
        except CancelledError:
            raise CanceledError("the request was cancelled while it waited") from None
        except Exception as error:
            logger.exception("%s failed", STREAM_RPC)
            raise InternalError(f"{STREAM_RPC}: {error!r}") from None
        self._sent_bytes += len(data)
        if emitted is None and self.observed is not None:
            self.observed.answered(response, self._sent_bytes)
        return data

    def _result(self) -> InferResponse:
        assert isinstance(self.outcome, Future)
        return self.outcome.result()

    def refusal(self, error: ServeError) -> bytes:
        """The message that says why the request failed."""
        logger.debug("%s: %s: %s", STREAM_RPC, error.code, error)
        if self.observed is not None:
            self.observed.failed(error.code, str(error))
        return codec.encode_stream_error(self.id, str(error), self._model)

    def emitted(self, response: InferResponse) -> None:
        """An answer before the last one waits to be written."""
        self._held.wait_for(_EMITTED_BYTES + _message_bytes(response))

    def written(self, response: InferResponse) -> None:
        """An answer before the last one has been written."""
        self._held.wait_for(-_EMITTED_BYTES - _message_bytes(response))

    def end(self) -> None:
        """The last answer is written, or nobody wants it any more; may be called again."""
        self._held.end()
        if self.observed is not None:
            self.observed.finish()


class _Held:
    """What a request holds: a place in the server, and memory for its answers.

    Attributes:
        settled: whether its outcome is there.
        listener, pending: who is told then, of what; forgotten afterwards.
    """

    __slots__ = (
        "_admission", "_lock", "_over", "_request_bytes", "_unwritten", "_unwritten_bytes", "listener",
        "pending", "settled",
    )  # fmt: skip

    def __init__(self, admission: Admission, unwritten: Unwritten) -> None:
        self._admission = admission
        self._unwritten = unwritten
        self.settled = False
        # No closure: with three more objects for each of 32 requests Python's gc takes 3 µs a request.
        self.listener: Listener | None = None
        self.pending: PendingAnswer | None = None
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
        listener, pending = self.listener, self.pending
        self.listener = self.pending = None
        if listener is not None and pending is not None:
            listener.settled(pending)

    def answered(self, size: int) -> None:
        with self._lock:
            self._leave()
            self._wait_for(size)
        self.settled = True

    def wait_for(self, size: int) -> None:
        with self._lock:
            self._wait_for(size)

    def end(self) -> None:
        with self._lock:
            self._leave()
            if not self._over:
                self._over = True
                self._unwritten.add(-self._unwritten_bytes)

    def _wait_for(self, size: int) -> None:
        """Count `size` bytes that wait to be written; below 0: they have been."""
        if not self._over:
            self._unwritten_bytes += size
            self._unwritten.add(size)

    def _leave(self) -> None:
        if self._request_bytes is not None:
            self._admission.leave(self._request_bytes)
            self._request_bytes = None


def _message_bytes(response: InferResponse) -> int:
    """Bytes of the tensors that go into the message; of several BYTES those of the elements' addresses."""
    return sum(_tensor_bytes(tensor.array) for tensor in response.outputs if tensor.shared_memory is None)


def _tensor_bytes(array: np.ndarray) -> int:
    if array.size == 1 and array.dtype == object:  # a text
        text: bytes = array.item()
        return len(text)
    return array.nbytes
