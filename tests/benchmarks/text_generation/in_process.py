"""The same without a network: the core's own interface."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from serve.core import InferenceCore
from serve.model_repository.repository import Repository
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, InferResponse, Tensor
from serve.settings import ServerSettings
from tests.benchmarks.text_generation.load import Load, Trace

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

LONGEST_SECONDS = 120.0


class Stream:
    """One text."""

    def __init__(self, core: InferenceCore, model: str, prompt: list[int], tokens: int, after: int) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self.after = after
        self.reached = threading.Event()
        ids = Tensor("input_ids", DATATYPES["INT64"], np.array(prompt))
        parameters = {"max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0.0}
        request = InferRequest(model, "", (ids,), parameters=parameters)
        self.ended = threading.Event()
        self.future: Future[InferResponse] = core.infer(request, Call(), emit=self.take)
        self.future.add_done_callback(self.last)

    def take(self, response: InferResponse) -> None:
        for output in response.outputs:
            self.ids += output.array.tolist()
            self.times += [time.perf_counter()] * len(output.array)
        if len(self.times) >= self.after:
            self.reached.set()

    def last(self, future: Future[InferResponse]) -> None:
        if future.exception() is None:
            self.take(future.result())
        self.reached.set()
        self.ended.set()

    def end(self) -> None:
        self.ended.wait(LONGEST_SECONDS)
        self.future.result(0)


class InProcess:
    """A repository's models, in this process."""

    def __init__(self, repository: Path) -> None:
        settings = ServerSettings(model_repository=(repository,), exit_on_error=True)
        self.repository = Repository(settings)
        self.repository.load()
        self.core = InferenceCore(settings, self.repository)

    def generate(self, load: Load, model: str = "gpt2") -> Trace:
        sent = time.perf_counter()
        streams = [Stream(self.core, model, prompt, load.tokens, load.after) for prompt in load.prompts]
        late_sent, late = 0.0, []
        if load.late:
            streams[0].reached.wait(LONGEST_SECONDS)
            late_sent = time.perf_counter()
            stream = Stream(self.core, model, load.late, load.late_tokens, 0)
            stream.end()
            late = stream.times
        for each in streams:
            each.end()
        return Trace(sent, [each.times for each in streams], late_sent, late, streams[0].ids)

    def close(self) -> None:
        self.core.close()
