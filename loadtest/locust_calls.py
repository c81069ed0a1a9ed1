"""One process's connections to a server, for locust's greenlets: requests out, what became of them back.

Calls are futures, which one thread of gRPC's serves for all greenlets of the process. Whoever asks for a call
in the usual way, and waits for it, has gRPC wait in a thread of its own under gevent.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import gevent
import grpc
from gevent.event import AsyncResult

from loadtest.target import INFER_PATH, STREAM_PATH
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.locust_schedule import Share
    from loadtest.payload import ModelLoad
    from loadtest.target import Target

now = time.perf_counter_ns


class Answer(NamedTuple):
    """What became of a request; times are of `now`.

    Attributes:
        done: when the answer, or the last of a stream, was there, or the failure.
        size: bytes of the answers.
        error: the status and what the server said with it; empty: none.
        first: when the first answer of a stream with outputs was there; 0: none was.
    """

    done: int
    size: int = 0
    error: str = ""
    first: int = 0


class Calls:
    """Connections that all users of a process share.

    Args:
        target: the server.
        models: what may be asked; each one's requests are sent in turn.
        connections: how many; requests take them in turn.
        timeout: seconds until a request is given up, its gRPC deadline.
        share: which of how many processes this is: each begins with other requests, because the id of a
            sequence must not be live twice.
    """

    def __init__(
        self, target: Target, models: Sequence[ModelLoad], connections: int, timeout: float, share: Share
    ) -> None:
        self.models = models
        self._channels = [target.open_channel() for _ in range(connections)]
        self._unary: Iterator[Any] = cycle([channel.unary_unary(INFER_PATH) for channel in self._channels])
        self._stream: Iterator[Any] = cycle(
            [channel.stream_stream(STREAM_PATH) for channel in self._channels]
        )
        self._options: Any = {"timeout": timeout, "metadata": target.headers}
        sizes = [len(model.requests) for model in models]
        self._turns = [count(size * (share.number % share.processes) // share.processes) for size in sizes]

    def close(self) -> None:
        """Close the connections, and end what is under way on them."""
        for channel in self._channels:
            channel.close()

    def start(self, model: int, finished: Callable[[Answer], None]) -> Callable[[], object]:
        """Send a request to a model and return; `finished` is called with what becomes of it.

        Returns:
            What gives the request up.
        """
        requests = self.models[model].requests
        request = requests[next(self._turns[model]) % len(requests)]
        if self.models[model].streams:
            reader = gevent.spawn(lambda: finished(self._read_stream(request)))
            return partial(reader.kill, block=False)
        call = next(self._unary).future(request, **self._options)
        call.add_done_callback(partial(_finish, finished))
        cancel: Callable[[], object] = call.cancel
        return cancel

    def wait(self, model: int) -> Answer:
        """Send a request to a model and wait for what becomes of it; who is killed meanwhile gives it up."""
        answer: Any = AsyncResult()
        give_up = self.start(model, answer.set)
        try:
            found: Answer = answer.get()
        except gevent.GreenletExit:
            give_up()
            raise
        return found

    def _read_stream(self, request: bytes) -> Answer:
        """Ask over a stream of its own, as a client of a text generator does, and read it to its end."""
        size = first = 0
        responses = next(self._stream)(iter([request]), **self._options)
        try:
            for message in responses:
                size += len(message)
                answer = pb.ModelStreamInferResponse.FromString(message)
                if answer.error_message:
                    return Answer(now(), size, f"error in the stream: {_line(answer.error_message)}", first)
                if not first and answer.infer_response.outputs:
                    first = now()
        except grpc.RpcError as error:
            return Answer(now(), size, _failure(error), first)
        finally:
            responses.cancel()
        return Answer(now(), size, "", first)


def _finish(finished: Callable[[Answer], None], call: Any) -> None:
    done = now()
    if call.code() is grpc.StatusCode.OK:
        finished(Answer(done, len(call.result())))
    else:
        finished(Answer(done, 0, _failure(call)))


def _failure(call: Any) -> str:
    return f"{call.code().name}: {_line(call.details() or '')}"


def _line(text: str) -> str:
    return " ".join(text.split())
