"""One ModelStreamInfer over bytes, whatever transport carries it: requests in, answers out.

One thread reads requests and hands them to their models, the transport's own one waits for what they answer,
so several requests of a stream are in the server at once. Models that answer once do so in the order of the
requests; the answers of decoupled ones, which may be many, go out as they come.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from serve.errors import CanceledError, DeadlineExceededError, InternalError, ServeError
from serve.protocol import codec
from serve.request import Call
from serve.rpc.due_messages import MAX_PENDING, DueMessages
from serve.rpc.pending_answer import STREAM_RPC, PendingAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from serve.core import InferenceCore
    from serve.rpc.due_messages import Due

logger = logging.getLogger(__name__)

# How long the client may take for one answer, beside what a link of 1 Mbit/s takes for its bytes; the second
# is for when the server stops.
LONGEST_WRITE_SECONDS = 20.0
_LONGEST_LAST_WRITE_SECONDS = 2.0
_SLOWEST_LINK_BYTES_PER_SECOND = 125_000
# A client that sends this wants the status of a request that fails as the stream's own.
_STATUS_ON_ERROR = ("triton_grpc_error", "true")


class InferStream:
    """One open stream.

    The transport iterates over `answers`, and calls `close` from any thread once the RPC is over: its status
    is on the wire, or the client has gone.
    """

    def __init__(
        self,
        core: InferenceCore,
        on_close: Callable[[InferStream], None],
        cancel: Callable[[], object],
        deadline: float | None,
        *,
        peer: str,
        metadata: Sequence[tuple[str, str | bytes]],
    ) -> None:
        """See `Streams.open`; `on_close` is called with the stream when its RPC is over."""
        self._core = core
        self._on_close = on_close
        self._cancel = cancel
        self._deadline = deadline
        self._peer = peer
        self._metadata = metadata
        self._status_on_error = _STATUS_ON_ERROR in metadata
        self._messages = DueMessages(core.streams.unwritten)
        self._draining = False
        self._write_due = math.inf  # when the answer that is being written should have been

    def answers(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer each request, until the client sends no more.

        A request that fails is answered with its error, and the stream goes on.

        Args:
            requests: serialized ModelInferRequests; raises, from another thread, when the client has gone.

        Yields:
            serialized ModelStreamInferResponses.

        Raises:
            ServeError: the stream's status is to be this: the server stops, or a model failed and the client
                wants to know it so.
        """
        threading.Thread(target=self._read, args=(requests,), name="stream-reader", daemon=True).start()
        try:
            while (due := self._messages.next()) is not None:
                message = self._message(due)
                self._write_due = time.monotonic() + len(message) / _SLOWEST_LINK_BYTES_PER_SECOND
                yield message
                self._write_due = math.inf
                self._written(due)
                del due, message  # not held while the next one is awaited
        finally:
            self._abandon()

    def drain(self) -> None:
        """Have the stream end as soon as nothing waits for an answer."""
        self._draining = True
        self._messages.drain()

    def end_if_stuck(self) -> None:
        """Cancel the RPC if its client has not taken an answer for too long, or leaves too many of them."""
        longest = _LONGEST_LAST_WRITE_SECONDS if self._draining else LONGEST_WRITE_SECONDS
        if time.monotonic() < self._write_due + longest and not self._floods():
            return
        logger.warning("%s: %s does not read its answers: the stream is cancelled", STREAM_RPC, self._peer)
        self._write_due = math.inf
        self._cancel()
        self.close()

    def _floods(self) -> bool:
        """Whether there is no more memory for unread answers, and many are this stream's.

        A model that answers many times can't be held back: the requests beside its own would wait, too.
        """
        return self._core.streams.unwritten.full and self._messages.unwritten > MAX_PENDING

    def close(self) -> None:
        """Give up what is not answered, and the stream's place; may be called again."""
        self._abandon()
        self._on_close(self)

    def _abandon(self) -> None:
        for pending in self._messages.close():
            self._give_up(pending)

    def _give_up(self, pending: PendingAnswer) -> None:
        pending.call.cancel()
        if pending.observed is not None:
            pending.observed.failed(CanceledError.code, "the stream ended before the answer was sent")
        pending.end()

    # The reader's thread

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            while self._messages.wait_for_room():
                data = next(requests, None)
                if data is None or not self._take(data):
                    break
                del data  # not held while the next one is awaited
        except Exception:  # noqa: BLE001 - the transport's own, of any kind: the client has gone
            self._abandon()
        self._messages.end_of_requests()

    def _take(self, data: bytes) -> bool:
        """Take a request; False: the stream was closed."""
        core = self._core
        pending = PendingAnswer(Call(self._deadline), core.admission, core.streams.unwritten)
        if not self._messages.take(pending):
            return False
        self._submit(pending, data)
        if not self._messages.submitted(pending):
            self._give_up(pending)
        return True

    def _submit(self, pending: PendingAnswer, data: bytes) -> None:
        """Hand a request to its model; what is wrong with it becomes its outcome."""
        core = self._core
        try:
            if core.observer.active:
                pending.observed = core.observer.begin(
                    STREAM_RPC, pending.call, len(data), self._peer, self._metadata
                )
            pending.enter(len(data))
            request = codec.decode_infer_request(data)
            pending.id = request.id
            if pending.observed is not None:
                pending.observed.parsed(request)
            # Also of one that will refuse it.
            pending.decoupled = core.repository.get(request.model_name, request.model_version).decoupled
            future = core.infer(request, pending.call, emit=partial(self._messages.emit, pending))
            pending.expect(future, request.model_name, self._messages)
        except ServeError as error:
            pending.id = pending.id or codec.request_id(data)
            pending.refuse(error.with_traceback(None))  # its frames hold the request
        except Exception as error:
            logger.exception("%s failed", STREAM_RPC)
            pending.refuse(InternalError(f"{STREAM_RPC}: {error!r}"))

    # The transport's thread

    def _message(self, due: Due) -> bytes:
        """A due message, or the one that says why its request failed.

        Raises:
            ServeError: the model's error, where the client wants it to be the stream's.
            DeadlineExceededError: the model has seen the RPC's deadline pass.
        """
        pending, emitted = due
        if emitted is None and isinstance(pending.outcome, ServeError):
            return pending.refusal(pending.outcome)
        try:
            return pending.message(emitted)
        except ServeError as failure:
            error = failure.with_traceback(None)  # its frames hold the request, whose future holds it
        refusal = pending.refusal(error)
        # Whoever sees the deadline pass first, gRPC or the model: it is the RPC's.
        expired = pending.call.expired(time.monotonic()) and isinstance(error, DeadlineExceededError)
        if self._status_on_error or expired:
            self._end(pending)
            raise error
        if emitted is not None:
            pending.call.cancel()
            self._end(pending)
        return refusal

    def _written(self, due: Due) -> None:
        """The transport has taken a message."""
        pending, emitted = due
        if emitted is None:
            self._end(pending)
        else:
            pending.written(emitted)

    def _end(self, pending: PendingAnswer) -> None:
        """A request needs no more messages: make room."""
        if self._messages.end(pending):
            pending.end()
