"""Texts that are generated at the same time, and when each of their tokens came."""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Load:
    """What to generate.

    Attributes:
        prompts: one a stream.
        tokens: to generate after each of them.
        late: a prompt that comes when the first stream has `after` tokens; empty: none does.
        late_tokens: to generate after that.
    """

    prompts: list[list[int]]
    tokens: int
    late: list[int]
    after: int = 0
    late_tokens: int = 8


@dataclass(frozen=True)
class Trace:
    """What came of it, on one clock, in seconds.

    Attributes:
        sent: when the first request was.
        streams: times of each stream's tokens.
        late_sent: when the late prompt was.
        late: times of its tokens.
        ids: the first stream's tokens.
    """

    sent: float
    streams: list[list[float]]
    late_sent: float
    late: list[float]
    ids: list[int]


class Source(Protocol):
    """A server, as its clients see it."""

    def generate(self, load: Load) -> Trace:
        """Put the load on it; wait for the end."""


class Child:
    """A process that answers each line of JSON with one."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def read(self) -> Any:
        """The next line.

        Raises:
            RuntimeError: the process has ended; the last line of what it said.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, said = self.process.communicate()
            raise RuntimeError(([*said.strip().splitlines(), "it ended"][-2:])[0])
        return json.loads(line)

    def ask(self, question: dict[str, Any]) -> Any:
        """The answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def tokens_per_second(times: list[list[float]]) -> float:
    """All streams' tokens per second, from when the last has its first token to when the first has its last.

    In between every stream is generating.
    """
    start, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    return sum(start < at <= end for stream in times for at in stream) / (end - start)


def intervals(trace: Trace, start: float, end: float) -> np.ndarray:
    """Seconds between a stream's tokens, of pairs whose later one came after `start`, `end` at the latest."""
    return np.array(
        [
            later - earlier
            for stream in trace.streams
            for earlier, later in itertools.pairwise(stream)
            if start < later <= end
        ]
    )
