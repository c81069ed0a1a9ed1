"""Calling a model: a request out, what became of it back.

Bytes, not messages, so that little of the time is the client's.
"""

from __future__ import annotations

import struct
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import grpc

from loadtest.samples import IN_STREAM, OK
from loadtest.target import INFER_PATH, STREAM_PATH
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loadtest.payload import ModelLoad
    from loadtest.target import Target

# A thread each; a stream beyond them waits in the client, which its latency from the schedule shows.
MOST_STREAMS = 512
_COUNTED = "num_output_tokens"
now = time.perf_counter_ns


class Outcome(NamedTuple):
    """What became of a request; times are of `time.perf_counter_ns`, the same clock in all processes.

    Attributes:
        done: when the answer, or the last one, was there, or the failure.
        status: gRPC's code, or `IN_STREAM`.
        message: what was said with a failure.
        first: when the first answer of a stream was there; 0: none was.
        tokens: how many tokens came.
        gaps: nanoseconds from one token of a stream to the next.
    """

    done: int
    status: int = OK
    message: str = ""
    first: int = 0
    tokens: int = 0
    gaps: tuple[int, ...] = ()


class Calls:
    """One process's connections to a server. Closes with its `with` block.

    Args:
        target: the server.
        models: what may be asked; a request is (index of the model, index of its request).
        connections: how many; requests take them in turn.
        timeout: seconds until a request is given up, its gRPC deadline.
    """

    def __init__(self, target: Target, models: list[ModelLoad], connections: int, timeout: float) -> None:
        self._models = models
        self._channels = [target.open_channel() for _ in range(connections)]
        self._unary: Iterator[Any] = cycle([channel.unary_unary(INFER_PATH) for channel in self._channels])
        self._stream: Iterator[Any] = cycle(
            [channel.stream_stream(STREAM_PATH) for channel in self._channels]
        )
        self._options: Any = {"timeout": timeout, "metadata": target.headers}
        self._threads = ThreadPoolExecutor(MOST_STREAMS, "stream")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        for channel in self._channels:
            channel.close()
        self._threads.shutdown()

    def start(self, model: int, request: int, finished: Callable[[Outcome], None]) -> None:
        """Send a request and return; `finished` is called with its outcome from another thread."""
        if self._models[model].streams:
            self._threads.submit(lambda: finished(self._read_stream(model, request)))
            return
        call = next(self._unary).future(self._models[model].requests[request], **self._options)
        call.add_done_callback(partial(_finish, finished))

    def wait(self, model: int, request: int) -> Outcome:
        """Send a request and wait for its outcome."""
        if self._models[model].streams:
            return self._read_stream(model, request)
        try:
            next(self._unary)(self._models[model].requests[request], **self._options)
        except grpc.RpcError as error:
            return _failure(error)
        return Outcome(now())

    def _read_stream(self, model: int, request: int) -> Outcome:
        """Ask over a stream of its own, as a client of a text generator does, and read it to its end."""
        times: list[int] = []
        counts: list[int] = []
        responses = next(self._stream)(iter([self._models[model].requests[request]]), **self._options)
        try:
            for message in responses:
                times.append(now())
                answer = pb.ModelStreamInferResponse.FromString(message)
                if answer.error_message:
                    responses.cancel()
                    return Outcome(times[-1], IN_STREAM, answer.error_message, times[0])
                counts.append(_tokens(answer.infer_response))
        except grpc.RpcError as error:
            return _failure(error)._replace(first=times[0] if times else 0, tokens=sum(counts))
        return _stream_outcome(times, counts)


def _finish(finished: Callable[[Outcome], None], call: Any) -> None:
    done = now()
    if call.code() is grpc.StatusCode.OK:
        finished(Outcome(done))
    else:
        finished(Outcome(done, call.code().value[0], call.details() or ""))


def _failure(error: Any) -> Outcome:
    return Outcome(now(), error.code().value[0], error.details() or "")


def _tokens(response: pb.ModelInferResponse) -> int:
    """How many tokens an answer has: what it says, else one, or none where it only ends the stream."""
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name == _COUNTED:
            return int(struct.unpack("<I", raw[:4])[0])
    return int(bool(response.outputs))


def _stream_outcome(times: list[int], counts: list[int]) -> Outcome:
    """The figures of a whole stream; a pause before several tokens counts as so many shorter ones."""
    with_tokens = [(at, count) for at, count in zip(times, counts, strict=True) if count]
    if not with_tokens:
        return Outcome(times[-1] if times else now())
    gaps: list[int] = []
    before = with_tokens[0][0]
    for at, count in with_tokens[1:]:
        gaps += [(at - before) // count] * count
        before = at
    return Outcome(times[-1], OK, "", with_tokens[0][0], sum(counts), tuple(gaps))
