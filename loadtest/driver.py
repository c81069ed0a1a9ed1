"""The load itself, in one process: requests at the times of a schedule, or by users who wait for answers."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from loadtest.calls import Outcome, now
from loadtest.samples import OK, UNSENT, Samples, merge

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from loadtest.calls import Calls

_NAP = 0.05  # seconds between looks at whether to stop
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class OpenLoad:
    """Requests at given times, whatever has been answered.

    Attributes:
        offsets: nanoseconds from the start of the run, sorted.
        models, requests: of each, the index of the model and of its request.
        most_under_way: one more isn't sent, but counted as `UNSENT`: the client has memory, too.
    """

    offsets: NDArray[np.int64]
    models: NDArray[np.int64]
    requests: NDArray[np.int64]
    most_under_way: int = 10_000


@dataclass(frozen=True)
class ClosedLoad:
    """Users who send one query after the other, each when its last one has been answered.

    Attributes:
        users: how many.
        seconds: for how long; what is under way then is waited for.
        models, requests: drawn up front as in `OpenLoad`, taken in turn and from the start again.
        per_query: requests of a query, sent together; it is answered with the last of them.
        most_queries: end after so many; 0: only after `seconds`.
    """

    users: int
    seconds: float
    models: NDArray[np.int64]
    requests: NDArray[np.int64]
    per_query: int = 1
    most_queries: int = 0


@dataclass
class Progress:
    """What a run has done so far, for another process to look at; `stop` may be set from there.

    Attributes:
        figures: sent, answered, failed; a shared array of integers.
        stop: whether to end early; a shared integer.
    """

    figures: list[int] = field(default_factory=lambda: [0, 0, 0])
    stop: list[int] = field(default_factory=lambda: [0])


def wait_until(due: int, stopped: Callable[[], object] = bool) -> bool:
    """Sleep until a time of `now`, never less; False when it was to stop instead."""
    while (left := due - now()) > 0:
        if stopped():
            return False
        time.sleep(min(left / 1e9, _NAP))
    return not stopped()


def wake_on_time() -> None:
    """Have the kernel wake this thread when its time has come; it would gather the timers of 50 µs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


class OpenLoop:
    """Runs an `OpenLoad` once."""

    def __init__(self, calls: Calls, load: OpenLoad, start: int, progress: Progress) -> None:
        self._calls = calls
        self._load = load
        self._start = start
        self._progress = progress
        count = len(load.offsets)
        self._sent, self._done, self._status, self._first, self._tokens = (
            array("q", bytes(8 * count)) for _ in range(5)
        )
        self._gaps: list[tuple[int, tuple[int, ...]]] = []
        self._messages: dict[int, str] = {}
        self._finished: list[int] = []  # appended to by gRPC's thread: its length is how many came back

    def run(self) -> Samples:
        """Send everything at its time, wait for what is under way, and give what was seen."""
        sent = self._send()
        while len(self._finished) < sent:
            self._progress.figures[1] = len(self._finished)
            time.sleep(1e-3)
        self._progress.figures[1] = sent
        return self._samples(sent)

    def _send(self) -> int:
        """How many were sent, or would have been."""
        wake_on_time()
        load, calls, finished, figures = self._load, self._calls, self._finished, self._progress.figures
        stopped, start = partial(self._progress.stop.__getitem__, 0), self._start
        plan = zip(load.offsets.tolist(), load.models.tolist(), load.requests.tolist(), strict=True)
        for index, (offset, model, request) in enumerate(plan):
            if not wait_until(start + offset, stopped):
                return index
            at = now() - start
            self._sent[index] = at
            if index - len(finished) >= load.most_under_way:
                self._note(
                    index, Outcome(start + at, UNSENT, f"{load.most_under_way} requests were under way")
                )
                continue
            calls.start(model, request, partial(self._note, index))
            figures[0] = index + 1
            figures[1] = len(finished)
        return len(load.offsets)

    def _note(self, index: int, outcome: Outcome) -> None:
        self._done[index] = outcome.done - self._start
        if outcome.status != OK:
            self._status[index] = outcome.status
            self._messages.setdefault(outcome.status, outcome.message)
            self._progress.figures[2] += 1
        if outcome.first:
            self._first[index] = outcome.first - self._start
            self._tokens[index] = outcome.tokens
            self._gaps.append((int(self._load.models[index]), outcome.gaps))
        self._finished.append(index)

    def _samples(self, count: int) -> Samples:
        columns = (self._sent, self._done, self._status, self._first, self._tokens)
        sent, done, status, first, tokens = (np.frombuffer(c, np.int64)[:count].copy() for c in columns)
        return Samples(
            self._load.models[:count], self._load.offsets[:count], sent, done, status, first, tokens,
            *_gap_columns(self._gaps), self._messages,
        )  # fmt: skip


def _gap_columns(gaps: list[tuple[int, tuple[int, ...]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    models = np.array([model for model, found in gaps for _ in found], np.int64)
    return models, np.array([gap for _, found in gaps for gap in found], np.int64)


class ClosedLoop:
    """Runs a `ClosedLoad` once, a thread for each user."""

    def __init__(self, calls: Calls, load: ClosedLoad, start: int, progress: Progress) -> None:
        self._calls = calls
        self._load = load
        self._start = start
        self._end = start + int(load.seconds * 1e9)
        self._progress = progress
        self._lock = threading.Lock()
        self._next = 0

    def run(self) -> Samples:
        """Let the users ask until the time is up, and give what they saw."""
        parts: list[Samples] = []
        users = [
            threading.Thread(target=lambda: parts.append(self._user()), name=f"user {n}", daemon=True)
            for n in range(self._load.users)
        ]
        for user in users:
            user.start()
        for user in users:
            user.join()
        return merge(parts)

    def _user(self) -> Samples:
        rows: list[tuple[int, int, int, int, int, int]] = []
        gaps: list[tuple[int, tuple[int, ...]]] = []
        messages: dict[int, str] = {}
        if wait_until(self._start, lambda: self._progress.stop[0]):
            while (query := self._take()) is not None:
                sent = now() - self._start
                for model, outcome in self._ask(query):
                    rows.append(_row(model, sent, outcome, self._start))
                    gaps.append((model, outcome.gaps))
                    if outcome.status != OK:
                        messages.setdefault(outcome.status, outcome.message)
        models, sent_at, done, status, first, tokens = np.array(rows, np.int64).reshape(-1, 6).T
        return Samples(
            models, sent_at, sent_at.copy(), done, status, first, tokens, *_gap_columns(gaps), messages
        )

    def _take(self) -> list[tuple[int, int]] | None:
        """The next query; None: it is over."""
        load = self._load
        with self._lock:
            over = load.most_queries and self._next >= load.most_queries
            if over or self._progress.stop[0] or now() >= self._end:
                return None
            first = self._next * load.per_query
            self._next += 1
            self._progress.figures[0] += load.per_query
        picks = [(first + n) % len(load.models) for n in range(load.per_query)]
        return [(int(load.models[pick]), int(load.requests[pick])) for pick in picks]

    def _ask(self, query: list[tuple[int, int]]) -> list[tuple[int, Outcome]]:
        """Send a query; its outcome: of several requests the worst, at the last one's end."""
        if len(query) == 1:
            outcomes = [(query[0][0], self._calls.wait(*query[0]))]
        else:
            outcomes = [self._ask_together(query)]
        with self._lock:
            self._progress.figures[1] += len(query)
            self._progress.figures[2] += sum(outcome.status != OK for _, outcome in outcomes)
        return outcomes

    def _ask_together(self, query: list[tuple[int, int]]) -> tuple[int, Outcome]:
        outcomes: list[Outcome] = []
        answered = threading.Semaphore(0)

        def finished(outcome: Outcome) -> None:
            outcomes.append(outcome)
            answered.release()

        for model, request in query:
            self._calls.start(model, request, finished)
        for _ in query:
            answered.acquire()
        worst = max(outcomes, key=lambda outcome: outcome.status)
        tokens = sum(outcome.tokens for outcome in outcomes)
        return query[0][0], worst._replace(done=max(o.done for o in outcomes), tokens=tokens)


def _row(model: int, sent: int, outcome: Outcome, start: int) -> tuple[int, int, int, int, int, int]:
    first = outcome.first - start if outcome.first else 0
    return model, sent, outcome.done - start, outcome.status, first, outcome.tokens
