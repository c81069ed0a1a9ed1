"""An open loop in locust: requests that are sent when they are due, and how late they were.

gevent's timers wake up to a millisecond late. So a thread keeps the time, 0.1 ms late, and wakes the greenlet
that sends.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Self

import gevent
from gevent.event import Event
from gevent.monkey import get_original
from gevent.threadpool import ThreadPool
from locust.dispatch import UsersDispatcher

from loadtest.driver import wake_on_time
from loadtest.latency import Histogram
from loadtest.locust_calls import Answer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from locust import User

    from loadtest.locust_calls import Calls
    from loadtest.locust_schedule import Arrival

MOST_UNDER_WAY = 10_000
# Later than this, the latencies are the load generator's as much as the server's.
LATE_MS = 2.0
_NAP = 0.05  # seconds between looks at whether to stop
_RETRY = 1e-3  # while the greenlet is behind
_TURN_NS = 1_000_000
_sleep = get_original("time", "sleep")
now = time.perf_counter_ns


class Pacer:
    """Gives the requests of a schedule when they are due. Ends with its `with` block.

    Args:
        arrivals: the schedule; it is drawn in the thread that keeps the time.
        start: nanoseconds of `now` from which its times count.
    """

    def __init__(self, arrivals: Iterator[Arrival], start: int) -> None:
        self._start = start
        self._due: deque[Arrival] = deque()
        self._stopped = False
        self._woken = Event()
        self._wake = gevent.get_hub().loop.async_()
        self._wake.start(self._woken.set)
        self._threads = ThreadPool(1)
        self._thread = self._threads.spawn(self._keep_time, arrivals)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stopped = True
        self._thread.wait()
        self._threads.kill()
        self._wake.close()

    def _keep_time(self, arrivals: Iterator[Arrival]) -> None:
        """The thread: nothing of gevent's but `_wake.send` may be used here."""
        wake_on_time()
        for arrival in arrivals:
            while (left := self._start + arrival.due - now()) > 0 or self.backlog >= MOST_UNDER_WAY:
                if self._stopped:
                    return
                _sleep(min(left / 1e9, _NAP) if left > 0 else _RETRY)
            self._due.append(arrival)
            self._wake.send()
            if self._stopped:
                return

    @property
    def backlog(self) -> int:
        """How many requests are due that nobody has taken."""
        return len(self._due)

    def take(self, stopped: Callable[[], bool]) -> Iterator[Arrival]:
        """The requests, each when it is due, to the end of the schedule or until it is to stop."""
        while not stopped():
            ended, turn = self._thread.ready(), now()
            while self._due and not stopped():
                yield self._due.popleft()
                if now() - turn > _TURN_NS:
                    gevent.sleep(0)  # the answers' turn
                    turn = now()
            if ended:
                self._thread.get()  # raises what ended it early
                return
            self._woken.wait(_NAP)
            self._woken.clear()


class OpenLoop:
    """Sends the requests of a schedule, whatever has been answered.

    Args:
        calls: to send with.
        report: is told the model's index, when its request was due, and what became of it.

    Attributes:
        lag: milliseconds from when a request was due to when it was sent.
        unsent: how many were due at the end and had not been sent.
    """

    def __init__(self, calls: Calls, report: Callable[[int, int, Answer], None]) -> None:
        self.lag = Histogram()
        self.unsent = 0
        self._calls = calls
        self._report = report
        self._under_way: dict[int, Callable[[], object]] = {}
        self._sent = 0
        self._answered = Event()

    @property
    def under_way(self) -> int:
        """How many requests have no answer yet."""
        return len(self._under_way)

    def run(self, arrivals: Iterator[Arrival], start: int, stopped: Callable[[], bool]) -> None:
        """Send to the end of the schedule or until it is to stop, and wait for what is under way.

        Args:
            arrivals: the schedule.
            start: nanoseconds of `now` from which its times count.
            stopped: whether to send no more.
        """
        with Pacer(arrivals, start) as pacer:
            try:
                for arrival in pacer.take(stopped):
                    self._send(arrival.model, start + arrival.due)
            finally:
                self.unsent = pacer.backlog
        while self._under_way:
            self._answered.wait()
            self._answered.clear()

    def give_up(self) -> None:
        """Give up what is under way; none of it is reported."""
        given_up, self._under_way = self._under_way, {}
        for cancel in given_up.values():
            cancel()

    def _send(self, model: int, due: int) -> None:
        at = now()
        self.lag.record((at - due) / 1e6)
        if len(self._under_way) >= MOST_UNDER_WAY:
            self._report(model, due, _unsent(at))
            return
        self._sent += 1
        number = self._sent

        def finished(answer: Answer) -> None:
            if self._under_way.pop(number, None):
                self._report(model, due, answer)
                self._answered.set()

        self._under_way[number] = bool  # it may be answered before `start` returns
        give_up = self._calls.start(model, finished)
        if number in self._under_way:
            self._under_way[number] = give_up


def _unsent(at: int) -> Answer:
    return Answer(at, 0, f"UNSENT: {MOST_UNDER_WAY} requests were under way")


class OneUserPerProcess(UsersDispatcher):
    """locust's dispatcher of users, but one user of a fixed count in each process, whatever --users says.

    Attributes:
        options: locust's, which a master sends to its workers with each dispatch; from `open_loop_processes`
            a worker knows its share.
    """

    options: ClassVar[argparse.Namespace]

    def new_dispatch(
        self, target_user_count: int, spawn_rate: float, user_classes: list[type[User]] | None = None
    ) -> None:
        """Start a dispatch; the arguments are locust's."""
        count = len(self._worker_nodes)
        self.options.open_loop_processes = count
        for user_class in user_classes or self._user_classes:
            if user_class.fixed_count and target_user_count:
                user_class.fixed_count = count
                target_user_count, spawn_rate = max(target_user_count, count), max(spawn_rate, count)
                self._try_dispatch_fixed = True  # a process that joined has none yet
        super().new_dispatch(target_user_count, spawn_rate, user_classes)
