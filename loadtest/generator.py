"""The load generator: worker processes, each with its share of one schedule, and what they saw as one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from loadtest.driver import ClosedLoad, OpenLoad
from loadtest.samples import Samples, merge
from loadtest.target import TargetError
from loadtest.worker import Connect, Ran, Run, work

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.payload import ModelLoad
    from loadtest.target import Target

# From the order until all workers have their share and wait for the first arrival.
_LEAD_SECONDS = 0.2
_LEAD_SECONDS_PER_REQUEST = 1e-6
_LOOK_SECONDS = 0.1
_SHORT_SECONDS = 1.0  # of a shorter run, what its end costs counts, too


@dataclass(frozen=True)
class Recording:
    """One run of a load.

    Attributes:
        samples: of all its requests.
        seconds: that it was to take; fewer if it was interrupted.
        started: when, UTC.
        cpu: seconds of a core that each worker computed, per second of the run.
        interrupted: whether it was ended early.
    """

    samples: Samples
    seconds: float
    started: datetime
    cpu: tuple[float, ...]
    interrupted: bool = False


@dataclass(frozen=True)
class Seen:
    """How far a run is: for a progress display."""

    seconds: float
    sent: int
    answered: int
    failed: int


class LoadGenerator:
    """Worker processes that send load to a server. Ends them with its `with` block.

    Args:
        processes: how many; each is a Python process and can use one core.
        connections: to the server, in each of them.
        timeout: seconds until a request is given up.
        realtime: schedule its processes before all others (SCHED_RR). Beside two busy programs on two cores,
            lag p99 was 0.3 ms in place of 3 to 6 at 1 000 requests/s; what it computes, it takes from a
            server beside it.

    Raises:
        TargetError: this user may not have processes scheduled so.
    """

    def __init__(
        self, processes: int = 1, connections: int = 1, timeout: float = 10.0, *, realtime: bool = False
    ) -> None:
        if realtime:
            _check_realtime()
        self._connections = connections
        self._timeout = timeout
        # Not a fork: gRPC's threads wouldn't be there in the child.
        context = multiprocessing.get_context("spawn")
        self._stop = context.RawArray("q", 1)
        self._figures = [context.RawArray("q", 3) for _ in range(processes)]
        self._pipes: list[Any] = []
        self._workers: list[Any] = []
        # Ctrl-C is for this process alone, from the first moment of the others on, which inherit this.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for figures in self._figures:
                ours, theirs = context.Pipe()
                worker = context.Process(
                    target=work, args=(theirs, figures, self._stop, realtime), daemon=True
                )
                worker.start()
                theirs.close()
                self._pipes.append(ours)
                self._workers.append(worker)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()

    def connect(self, target: Target, models: Sequence[ModelLoad]) -> None:
        """Open the connections for the runs that follow.

        Raises:
            TargetError: a worker ended.
        """
        order = Connect(target, list(models), self._connections, self._timeout)
        self._tell([order] * len(self._pipes))
        self._answers(lambda: None)

    def run(
        self, load: OpenLoad | ClosedLoad, seconds: float, show: Callable[[Seen], None] = lambda _seen: None
    ) -> Recording:
        """Run a load and wait for its end; Ctrl-C ends it early, with what there is.

        Args:
            load: of all workers together.
            seconds: that it takes, without the answers to the last requests.
            show: is told how far it is, ten times a second.

        Raises:
            TargetError: a worker ended.
        """
        self._stop[0] = 0
        for figures in self._figures:
            figures[:] = [0, 0, 0]
        shares = [_share(load, n, len(self._pipes)) for n in range(len(self._pipes))]
        count = len(load.offsets) if isinstance(load, OpenLoad) else 0
        lead = _LEAD_SECONDS + count * _LEAD_SECONDS_PER_REQUEST
        start = time.perf_counter_ns() + int(lead * 1e9)
        started = datetime.now(UTC)
        self._tell([Run(share, start) for share in shares])
        answers = self._answers(lambda: show(self._seen(start)))
        interrupted = bool(self._stop[0])
        ran = [answer for answer in answers if isinstance(answer, Ran)]
        # Not beyond the end: the CPU of a worker that only waits for late answers would look idle.
        took = [min(share.seconds, max(seconds, _SHORT_SECONDS)) for share in ran]
        return Recording(
            merge([share.samples for share in ran]),
            max(took) if interrupted else seconds,
            started,
            tuple(share.cpu / max(time_taken, 1e-3) for share, time_taken in zip(ran, took, strict=True)),
            interrupted,
        )

    def _tell(self, orders: Sequence[Any]) -> None:
        for pipe, order in zip(self._pipes, orders, strict=True):
            try:
                pipe.send(order)
            except OSError as error:
                raise TargetError(f"a process of the load generator ended: {error}") from error

    def _answers(self, look: Callable[[], None]) -> list[Any]:
        """One of each worker; Ctrl-C asks the workers to end."""
        answers: list[Any] = []
        for pipe in self._pipes:
            while True:
                try:
                    if pipe.poll(_LOOK_SECONDS):
                        answers.append(pipe.recv())
                        break
                    look()
                except KeyboardInterrupt:
                    if self._stop[0]:
                        raise
                    self._stop[0] = 1
                except (EOFError, OSError) as error:
                    raise TargetError(
                        "a process of the load generator ended; had it enough memory?"
                    ) from error
        return answers

    def _seen(self, start: int) -> Seen:
        sent, answered, failed = np.array([list(figures) for figures in self._figures]).sum(axis=0).tolist()
        return Seen(max(0.0, (time.perf_counter_ns() - start) / 1e9), sent, answered, failed)


def _check_realtime() -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError as error:
        raise TargetError(
            f"--realtime: {error.strerror}; it needs root or CAP_SYS_NICE, and a container's leave"
        ) from error
    os.sched_setscheduler(0, *before)


def _share(load: OpenLoad | ClosedLoad, index: int, count: int) -> OpenLoad | ClosedLoad:
    """A worker's part: every n-th request of a schedule, as many of the users as fall to it."""
    if isinstance(load, OpenLoad):
        return OpenLoad(
            load.offsets[index::count], load.models[index::count], load.requests[index::count],
            max(1, load.most_under_way // count),
        )  # fmt: skip
    users = load.users // count + (index < load.users % count)
    queries = load.most_queries // count + (index < load.most_queries % count)
    if not users or (load.most_queries and not queries):
        return replace(load, users=0)
    shift = index * len(load.models) // count
    return replace(
        load, users=users, most_queries=queries,
        models=np.roll(load.models, shift), requests=np.roll(load.requests, shift),
    )  # fmt: skip
