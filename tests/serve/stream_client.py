"""A stream's client without a transport, and the requests that it sends."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.core import InferenceCore
from serve.model_repository.repository import Repository
from serve.pb import grpc_service_pb2 as pb
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LONG = 1_000_000  # multiplications of the slow model: minutes, so that only a cancellation ends it
GRPC_ERRORS = (("triton_grpc_error", "true"),)


def make_core(
    root: Path, made: Callable[[ServerSettings], Repository] = Repository, **settings: Any
) -> InferenceCore:
    flags = ServerSettings(model_repository=(root,), **settings)
    core = InferenceCore(flags, made(flags))
    core.repository.load()
    return core


def request(
    model: str, name: str, datatype: str, array: np.ndarray, identity: str = ""
) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, id=identity, raw_input_contents=[array.tobytes()])
    message.inputs.add(name=name, datatype=datatype, shape=array.shape)
    return message


def scaled(value: float, identity: str = "") -> pb.ModelInferRequest:
    return request("versions", "x", "FP32", np.full((1, 4), value, np.float32), identity)


def slow(count: int, identity: str = "") -> pb.ModelInferRequest:
    return request("slow", "n", "INT64", np.array(count, np.int64), identity)


def gather(index: int, identity: str = "") -> pb.ModelInferRequest:
    return request("gather", "x", "INT64", np.array([index], np.int64), identity)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.002)


class Client:
    """What a transport would carry: requests that are taken one by one, and the answers to them."""

    def __init__(
        self,
        core: InferenceCore,
        metadata: tuple[tuple[str, str], ...] = (),
        deadline: float | None = None,
    ) -> None:
        self.asked = self.taken = 0
        self.cancelled = threading.Event()
        self._sent: queue.Queue[bytes | None] = queue.Queue()
        self._vanished = False
        self.stream = core.streams.open(core, deadline, "peer", metadata, self.cancelled.set)
        self._answers = self.stream.answers(self)

    def send(self, *messages: pb.ModelInferRequest | bytes) -> None:
        for message in messages:
            self._sent.put(message if isinstance(message, bytes) else message.SerializeToString())

    def half_close(self) -> None:
        self._sent.put(None)

    def vanish(self) -> None:
        self._vanished = True
        self._sent.put(None)
        self.stream.close()

    def receive(self) -> pb.ModelStreamInferResponse:
        return pb.ModelStreamInferResponse.FromString(next(self._answers))

    def rest(self) -> list[pb.ModelStreamInferResponse]:
        messages = [pb.ModelStreamInferResponse.FromString(answer) for answer in self._answers]
        self.stream.close()
        return messages

    def __iter__(self) -> Client:
        return self

    def __next__(self) -> bytes:
        self.asked += 1
        data = self._sent.get()
        if data is None:
            if self._vanished:
                raise ConnectionError("the client has gone")
            raise StopIteration
        self.taken += 1
        return data


def in_background(call: Callable[[], Any]) -> Future[Any]:
    """A call's result, from a thread that keeps nobody from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def readers() -> int:
    return sum(thread.name == "stream-reader" for thread in threading.enumerate())
