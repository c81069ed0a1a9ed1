"""One ModelStreamInfer over bytes, whatever transport carries it: requests in, answers out in the same order.

One thread reads requests and hands them to their models, the transport's own one waits for the answers in
turn, so several requests of a stream are in the server at once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from serve.errors import CanceledError, InternalError, ServeError, UnavailableError
from serve.protocol import codec
from serve.request import Call
from serve.rpc.pending_answer import PendingAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from serve.core import InferenceCore

logger = logging.getLogger(__name__)

STREAM_RPC = "ModelStreamInfer"
# Requests of one stream that are read but not answered; then the client has to wait, too.
MAX_PENDING = 32
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
        self._pending: deque[PendingAnswer] = deque()
        self._reading = True
        self._submitting = False
        self._draining = False
        self._closed = False
        self._due = math.inf  # when the answer that is being written should have been
        self._changed = threading.Condition(threading.Lock())

    def answers(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer each request with one message, in order, until the client sends no more.

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
            while (pending := self._next()) is not None:
                answer = self._answer(pending)
                self._due = time.monotonic() + len(answer) / _SLOWEST_LINK_BYTES_PER_SECOND
                yield answer
                self._due = math.inf
                self._answered(pending)
        finally:
            self._abandon()

    def drain(self) -> None:
        """Have the stream end as soon as nothing waits for an answer."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def end_if_stuck(self) -> None:
        """Cancel the RPC if its client has not taken an answer for too long."""
        longest = _LONGEST_LAST_WRITE_SECONDS if self._draining else LONGEST_WRITE_SECONDS
        if time.monotonic() < self._due + longest:
            return
        logger.warning("%s: %s does not read its answers: the stream is cancelled", STREAM_RPC, self._peer)
        self._due = math.inf
        self._cancel()
        self.close()

    def close(self) -> None:
        """Give up what is not answered, and the stream's place; may be called again."""
        self._abandon()
        self._on_close(self)

    def _abandon(self) -> None:
        with self._changed:
            self._closed = True
            abandoned = list(self._pending)
            self._pending.clear()
            self._changed.notify_all()
        for pending in abandoned:
            self._give_up(pending)

    def _give_up(self, pending: PendingAnswer) -> None:
        pending.call.cancel()
        if pending.observed is not None:
            pending.observed.failed(CanceledError.code, "the stream ended before the answer was sent")
        pending.end()

    # The reader's thread

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            while self._wait_for_room():
                data = next(requests, None)
                if data is None or not self._take():
                    break
                self._append(self._submit(data))
        except Exception:  # noqa: BLE001 - the transport's own, of any kind: the client has gone
            self._abandon()
        with self._changed:
            self._reading = False
            self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait while enough is pending, or the server stops; False when no more are to be read."""
        with self._changed:
            while self._full() and not self._closed:
                self._changed.wait()
            return not self._closed

    def _full(self) -> bool:
        if self._draining or len(self._pending) >= MAX_PENDING:
            return True
        return bool(self._pending) and self._core.streams.unwritten.full

    def _take(self) -> bool:
        """Whether a request that has arrived is to be answered, which the stream then doesn't end before."""
        with self._changed:
            self._submitting = not self._closed
            return self._submitting

    def _submit(self, data: bytes) -> PendingAnswer:
        """Hand a request to its model; what is wrong with it becomes its outcome."""
        core = self._core
        pending = PendingAnswer(Call(self._deadline), core.admission, core.streams.unwritten)
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
            pending.expect(core.infer(request, pending.call))
        except ServeError as error:
            pending.id = pending.id or codec.request_id(data)
            pending.refuse(error.with_traceback(None))  # its frames hold the request
        except Exception as error:
            logger.exception("%s failed", STREAM_RPC)
            pending.refuse(InternalError(f"{STREAM_RPC}: {error!r}"))
        return pending

    def _append(self, pending: PendingAnswer) -> None:
        with self._changed:
            self._submitting = False
            if not self._closed:
                self._pending.append(pending)
                self._changed.notify_all()
                return
        self._give_up(pending)

    # The transport's thread

    def _next(self) -> PendingAnswer | None:
        """The request whose answer is due; None: there will be none any more.

        Raises:
            UnavailableError: the server stops.
        """
        with self._changed:
            while not self._pending:
                if self._closed or not self._reading:
                    return None
                if self._draining and not self._submitting:
                    self._closed = True
                    raise UnavailableError("the server is shutting down: go on with another stream")
                self._changed.wait()
            return self._pending[0]

    def _answer(self, pending: PendingAnswer) -> bytes:
        """Wait for a request's one answer, or say why there is none.

        Raises:
            ServeError: the model's error, where the client wants it to be the stream's.
        """
        error: ServeError
        try:
            if isinstance(pending.outcome, ServeError):
                return self._refusal(pending, pending.outcome)
            response = pending.outcome.result()
            data = codec.encode_stream_response(response)
        except ServeError as failure:
            error = failure
        except CancelledError:
            error = CanceledError("the request was cancelled while it waited")
        except Exception as failure:
            logger.exception("%s failed", STREAM_RPC)
            error = InternalError(f"{STREAM_RPC}: {failure!r}")
        else:
            if pending.observed is not None:
                pending.observed.answered(response, len(data))
            return data
        refusal = self._refusal(pending, error)
        if self._status_on_error:
            raise error
        return refusal

    def _refusal(self, pending: PendingAnswer, error: ServeError) -> bytes:
        logger.debug("%s: %s: %s", STREAM_RPC, error.code, error)
        if pending.observed is not None:
            pending.observed.failed(error.code, str(error))
        return codec.encode_stream_error(pending.id, str(error))

    def _answered(self, pending: PendingAnswer) -> None:
        """The transport has taken the answer: make room."""
        with self._changed:
            if not (self._pending and self._pending[0] is pending):
                return  # closed meanwhile
            self._pending.popleft()
            self._changed.notify_all()
        pending.end()
