"""Triton's dynamic batching: which requests make up the next run. Pure: no threads, the clock is passed in.

Two things differ from Triton. Where requests of different shapes wait, Triton sends what it has when the next
one has another shape; here each shape gathers a batch of its own and the oldest request's goes first, so that
mixed traffic makes batches too and nothing starves. And a request's deadline counts: it is not made to wait
for others until it can't be met, nor run when it can't be met any more.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from serve.errors import DeadlineExceededError, ModelLoadError
from serve.scheduling.policy_queue import PriorityQueue, QueuePolicy
from serve.scheduling.run_times import RunTimes
from serve.scheduling.scheduler import Decision, drop_reason

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from serve.errors import ServeError
    from serve.pb import model_config_pb2 as pb
    from serve.scheduling.scheduler import QueuedRequest

# In the place of an answer that isn't there.
_NONE_YET = object()


@dataclass(frozen=True, slots=True)
class BatcherSettings:
    """A config's `dynamic_batching`, checked.

    Attributes:
        max_batch_size: rows of a run, at least 1.
        preferred_batch_sizes: rows with which a batch needn't wait any longer, ascending; empty: the most.
        max_queue_delay: how long a request may wait for others to join it, seconds.
        preserve_ordering: answers go out in order of arrival.
        priority_levels: 1 is the most urgent level, this the least; 0: no priorities.
        default_priority_level: of requests that name none.
        default_queue_policy: of levels that have none of their own.
        priority_queue_policy: by level.
    """

    max_batch_size: int
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay: float = 0.0
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = field(default_factory=QueuePolicy)
    priority_queue_policy: Mapping[int, QueuePolicy] = field(default_factory=dict)

    @classmethod
    def from_config(cls, message: pb.ModelDynamicBatching, max_batch_size: int) -> BatcherSettings:
        """The settings of a config's message. As in Triton, policies by level need priority_levels.

        Raises:
            ModelLoadError: a value is out of its range.
        """
        for size in message.preferred_batch_size:
            _check_range("preferred_batch_size", size, max_batch_size, "max_batch_size")
        levels = message.priority_levels
        if levels:
            _check_range("default_priority_level", message.default_priority_level, levels, "priority_levels")
            for level in message.priority_queue_policy:
                _check_range("priority_queue_policy's key", level, levels, "priority_levels")
        return cls(
            max(1, max_batch_size),
            tuple(sorted(set(message.preferred_batch_size))),
            message.max_queue_delay_microseconds / 1e6,
            message.preserve_ordering,
            levels,
            message.default_priority_level,
            QueuePolicy.from_config(message.default_queue_policy),
            {level: QueuePolicy.from_config(p) for level, p in message.priority_queue_policy.items()},
        )


def _check_range(name: str, value: int, most: int, most_name: str) -> None:
    if not 1 <= value <= most:
        raise ModelLoadError(
            f"config.pbtxt: dynamic_batching.{name} is {value}, expected 1 to {most} ({most_name})"
        )


class DynamicBatcher:
    """The scheduler of a model that batches."""

    def __init__(self, settings: BatcherSettings, useful_batch_size: int | None = None) -> None:
        """Make batches of at most max_batch_size rows.

        Args:
            settings: the config's.
            useful_batch_size: rows beyond which a batch doesn't pay, from the warm-up. Larger batches are
                made only up to the largest preferred size. None: max_batch_size.
        """
        most = useful_batch_size or settings.max_batch_size
        self._limit = min(settings.max_batch_size, max(most, *settings.preferred_batch_sizes, 1))
        self._preferred = frozenset(settings.preferred_batch_sizes or (self._limit,))
        self._least_preferred = min(self._preferred)
        self._most_preferred = max(self._preferred)
        self._delay = settings.max_queue_delay
        # A request of any size is a preferred batch where 1 row is.
        self.immediate = not self._delay or self._most_preferred == 1
        self._runs = RunTimes()
        self._started: dict[QueuedRequest, float] = {}
        self._queue = PriorityQueue(
            settings.default_queue_policy,
            settings.priority_levels,
            settings.default_priority_level,
            settings.priority_queue_policy,
        )

    def __len__(self) -> int:
        return len(self._queue)

    def enqueue(self, queued: QueuedRequest, now: float) -> None:
        """Have a request wait; raises as `PriorityQueue.enqueue` does."""
        self._queue.enqueue(queued, now)

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a cancelled request out; whether it waited."""
        return self._queue.remove(queued)

    def finished(self, batch: Sequence[QueuedRequest], now: float) -> None:
        """Learn how long a batch took; one that never waited tells nothing."""
        first = batch[0]
        started = self._started.pop(first, None)
        if started is not None:
            self._runs.add(first.shape, sum([queued.rows for queued in batch]), started, now)

    def drain(self) -> None:
        """Send what waits without delay from now on."""
        self._delay = 0.0

    def next(self, now: float) -> Decision:
        """The next batch, if one is due. While another instance is free, ask again at once."""
        queue = self._queue
        queue.expire(now)
        batch: list[QueuedRequest] = []
        waited = -1
        # Anew after the first of a shape turned out to be dead: another shape's may come before the second.
        while not batch and queue.waiting != waited:
            waited = queue.waiting
            for shape in self._shapes(now):
                batch = self._form(shape, now)
                if batch or queue.waiting != waited:
                    break
        if batch:
            self._started[batch[0]] = now
            queue.take(batch)
        return Decision(batch, queue.take_dropped(), None if batch else self._wake_at())

    def _shapes(self, now: float) -> Iterator[Hashable]:
        """Shapes of which a batch may be due, in the order in which their first requests are to be served."""
        for lane in self._queue.lanes:
            if not lane.order:
                continue
            # Where much waits the first one of all is due, and the others needn't be put in order.
            head = next(iter(lane.order)).shape
            if not self._delay or self._may_be_due(head, now):
                yield head
            firsts = [(next(iter(same.fifo.values())), shape) for shape, same in lane.by_shape.items()]
            for _, shape in sorted(firsts, key=itemgetter(0)):
                if self._may_be_due(shape, now):
                    yield shape

    def _may_be_due(self, shape: Hashable, now: float) -> bool:
        """Whether it is worth looking at a shape's requests one by one."""
        due, slowest = self._due(shape), self._runs.slowest
        queues = [lane.by_shape[shape] for lane in self._queue.lanes if shape in lane.by_shape]
        return (
            now >= due
            or sum([same.rows for same in queues]) >= self._least_preferred
            or any(same.deadline <= due + slowest for same in queues)
        )

    def _due(self, shape: Hashable) -> float:
        """When the first of a shape's requests has waited for others for long enough, seconds."""
        lanes = self._queue.lanes
        first = [next(iter(lane.by_shape[shape].fifo.values())) for lane in lanes if shape in lane.by_shape]
        return min(first, default=math.inf) + self._delay

    def _form(self, shape: Hashable, now: float) -> list[QueuedRequest]:
        """The batch of a shape that is to be sent now; empty: none is. Drops the dead among its requests."""
        live, full = self._live(shape, now)
        if not self._delay and self._least_preferred >= self._limit:
            return live
        best = rows = 0
        for index, queued in enumerate(live):
            rows += queued.rows
            if index and rows > self._most_preferred and not best:
                best = index
            if rows in self._preferred:
                best = index + 1
        due = self._due(shape)
        if best and not (self._delay and now >= due):
            return live[:best]
        if now >= due or full or rows >= self._most_preferred or self._pressed(live, due):
            return live
        return []

    def _live(self, shape: Hashable, now: float) -> tuple[list[QueuedRequest], bool]:
        """Requests of a shape in the order of service, as many as fit, and whether no more do.

        None where the first one is dead, so that the order of the shapes is looked at again.
        """
        live: list[QueuedRequest] = []
        dead: list[tuple[QueuedRequest, ServeError]] = []
        rows, full, headless = 0, False, False
        close = now + self._runs.slowest
        for queued in self._waiting(shape):
            deadline = queued.call.deadline
            if queued.future.cancelled() or (deadline is not None and deadline <= close):
                reason = self._drop_reason(queued, now)
                if reason is not None:
                    dead.append((queued, reason))
                    headless = headless or not live
                    continue
            rows += queued.rows
            full = rows >= self._limit
            if rows > self._limit and live:
                break
            live.append(queued)
            if full:
                break
        for queued, reason in dead:
            self._queue.drop(queued, reason)
        return ([], False) if headless else (live, full)

    def _waiting(self, shape: Hashable) -> Iterator[QueuedRequest]:
        for lane in self._queue.lanes:
            same = lane.by_shape.get(shape)
            if same is not None:
                yield from same.fifo

    def _drop_reason(self, queued: QueuedRequest, now: float) -> ServeError | None:
        """Why a request needs no run any more, or can't have been run in time; None where it can."""
        shape = queued.shape
        rows = sum([lane.by_shape[shape].rows for lane in self._queue.lanes if shape in lane.by_shape])
        least = self._runs.least(shape, min(rows, self._limit), now)
        reason = drop_reason(queued, now + least)
        if least and isinstance(reason, DeadlineExceededError):
            name = queued.request.model_name
            return DeadlineExceededError(
                f"model '{name}': the request's deadline is nearer than the {least:.3g} s that a run takes"
            )
        return reason

    def _pressed(self, live: Sequence[QueuedRequest], due: float) -> bool:
        """Whether waiting until `due` would leave one of them too little time for its run."""
        latest = due + self._runs.slowest
        return any(queued.call.deadline is not None and queued.call.deadline <= latest for queued in live)

    def _wake_at(self) -> float | None:
        """When something is due, or expires, although nothing arrives; None: nothing waits."""
        times = [next(iter(lane.order.values())) + self._delay for lane in self._queue.lanes if lane.order]
        expiry = self._queue.next_expiry()
        if expiry is not None:
            times.append(expiry)
        return min(times, default=None)


class InOrder:
    """Holds answers back until those of all earlier requests are there.

    An expected request must be finished, whatever becomes of it: those behind it wait for that.
    """

    def __init__(self) -> None:
        self._answers: OrderedDict[QueuedRequest, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def expect(self, queued: QueuedRequest) -> None:
        """Take note of a request; its answer goes out behind those of all that came before."""
        self._answers[queued] = _NONE_YET

    def finish(self, queued: QueuedRequest, answer: Any) -> list[tuple[QueuedRequest, Any]]:
        """The requests whose answers may go out now that this one's is there, in order, with their answers.

        A request that is not expected, or already has an answer, changes nothing: the first one counts.
        """
        answers = self._answers
        if answers.get(queued) is not _NONE_YET:
            return []
        answers[queued] = answer
        released = []
        while answers and next(iter(answers.values())) is not _NONE_YET:
            released.append(answers.popitem(last=False))
        return released
