"""What the dynamic batcher sends when, against Triton's rules, with a clock of the test's own."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    ModelLoadError,
    ServeError,
    UnavailableError,
)
from serve.pb import model_config_pb2 as pb
from serve.request import Call, InferRequest
from serve.scheduling.batcher import BatcherSettings, DynamicBatcher, InOrder
from serve.scheduling.policy_queue import DELAY, REJECT, QueuePolicy
from serve.scheduling.run_times import RunTimes
from serve.scheduling.scheduler import QueuedRequest

SECOND = 1_000_000


def queued(
    rows: int = 1, shape: object = "a", deadline: float | None = None, **parameters: int
) -> QueuedRequest:
    request = InferRequest("m", "", (), parameters=parameters)
    return QueuedRequest(request, Call(deadline), Future(), rows, shape)


def batcher(max_batch_size: int = 8, useful: int | None = None, **fields: Any) -> DynamicBatcher:
    return DynamicBatcher(BatcherSettings(max_batch_size, **fields), useful)


def enqueue(scheduler: DynamicBatcher, *requests: QueuedRequest, now: float = 0) -> None:
    for request in requests:
        scheduler.enqueue(request, now)


def sizes(scheduler: DynamicBatcher, now: float = 0) -> list[int]:
    """The rows of all batches that are given out at one time."""
    batches = []
    while batch := scheduler.next(now).batch:
        batches.append(sum(request.rows for request in batch))
    return batches


# --- the config


def from_config(text: str, max_batch_size: int = 8) -> BatcherSettings:
    return BatcherSettings.from_config(text_format.Parse(text, pb.ModelDynamicBatching()), max_batch_size)


def test_settings_are_read_from_the_config() -> None:
    read = from_config(
        """preferred_batch_size: [8, 4, 4] max_queue_delay_microseconds: 500 preserve_ordering: true
        priority_levels: 2 default_priority_level: 1 default_queue_policy { max_queue_size: 5 }
        priority_queue_policy { key: 2 value { timeout_action: DELAY default_timeout_microseconds: 7 } }"""
    )
    assert read == BatcherSettings(
        max_batch_size=8,
        preferred_batch_sizes=(4, 8),
        max_queue_delay=0.0005,
        preserve_ordering=True,
        priority_levels=2,
        default_priority_level=1,
        default_queue_policy=QueuePolicy(max_queue_size=5),
        priority_queue_policy={2: QueuePolicy(DELAY, 7)},
    )
    assert from_config("") == BatcherSettings(8)
    assert from_config("", 0) == BatcherSettings(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preferred_batch_size: 0", r"preferred_batch_size is 0, expected 1 to 8 \(max_batch_size\)"),
        ("preferred_batch_size: -1", "preferred_batch_size is -1"),
        ("preferred_batch_size: [4, 9]", "preferred_batch_size is 9, expected 1 to 8"),
        ("priority_levels: 2", r"default_priority_level is 0, expected 1 to 2 \(priority_levels\)"),
        ("priority_levels: 2 default_priority_level: 3", "default_priority_level is 3, expected 1 to 2"),
        (
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value {} }",
            "priority_queue_policy's key is 3, expected 1 to 2",
        ),
        (
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 0 value {} }",
            "priority_queue_policy's key is 0, expected 1 to 2",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(text: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        from_config(text)


def test_policies_by_level_without_levels_have_no_effect() -> None:
    read = from_config(
        "default_priority_level: 3 priority_queue_policy { key: 0 value { max_queue_size: 1 } }"
    )
    scheduler = DynamicBatcher(read)
    enqueue(scheduler, queued(), queued(priority=2))
    assert sizes(scheduler) == [2]


# --- the batch


def test_what_waits_goes_at_once_and_together() -> None:
    scheduler = batcher()
    requests = [queued(2) for _ in range(5)]
    enqueue(scheduler, *requests)
    assert scheduler.next(0).batch == requests[:4]
    assert scheduler.next(0).batch == requests[4:]
    assert scheduler.next(0).batch == []
    assert len(scheduler) == 0


def test_one_that_does_not_fit_is_not_overtaken() -> None:
    scheduler = batcher()
    requests = [queued(5), queued(4), queued(1)]
    enqueue(scheduler, *requests)
    assert scheduler.next(0).batch == requests[:1]
    assert scheduler.next(0).batch == requests[1:]


# Worked out by hand from the order of the tests in Triton's dynamic_batch_scheduler.cc, GetDynamicBatch.
@pytest.mark.parametrize(
    ("preferred", "delay", "rows", "sent"),
    [
        ((4,), 0, [1] * 3, [3]),
        ((4,), 0, [1] * 6, [4, 2]),
        ((4,), 0, [1] * 10, [4, 4, 2]),
        ((4, 6), 0, [1] * 10, [6, 4]),
        ((4,), 0, [3, 2], [3, 2]),
        ((4,), 0, [5, 1], [5, 1]),
        ((2, 8), 0, [1, 2], [3]),
        ((4,), 9, [1] * 3, []),
        ((4,), 9, [1] * 6, [4]),
        ((4,), 9, [3, 2], [3]),
        ((4,), 9, [5, 1], [5]),
        ((2, 8), 9, [1, 2], []),
        ((2, 8), 9, [1, 1, 1], [2]),
        ((), 9, [1] * 7, []),
        ((), 9, [1] * 8, [8]),
        ((), 9, [1] * 9, [8]),
        ((), 9, [5, 4], [5]),
        ((6,), 9, [4, 4, 4], [4, 4]),
    ],
)
def test_preferred_sizes_are_formed_as_in_triton(
    preferred: tuple[int, ...], delay: float, rows: list[int], sent: list[int]
) -> None:
    scheduler = batcher(preferred_batch_sizes=preferred, max_queue_delay=delay)
    enqueue(scheduler, *map(queued, rows))
    assert sizes(scheduler) == sent
    if delay:
        # When the oldest has waited for so long, all goes that fits.
        left = sum(rows) - sum(sent)
        assert sizes(scheduler, delay) == ([left] if left else [])


def test_the_delay_is_that_of_the_oldest() -> None:
    scheduler = batcher(max_queue_delay=5)
    first, second = queued(), queued()
    enqueue(scheduler, first, now=10)
    assert scheduler.next(10).wake_at == 15
    enqueue(scheduler, second, now=14)
    decision = scheduler.next(14)
    assert (decision.batch, decision.wake_at) == ([], 15)
    assert scheduler.next(15).batch == [first, second]


def test_when_the_oldest_leaves_the_delay_is_the_next_ones() -> None:
    scheduler = batcher(max_queue_delay=5)
    first, second = queued(), queued()
    enqueue(scheduler, first, now=0)
    enqueue(scheduler, second, now=3)
    assert scheduler.remove(first)
    decision = scheduler.next(5)
    assert (decision.batch, decision.wake_at) == ([], 8)


def test_a_drain_ends_the_delay() -> None:
    scheduler = batcher(max_queue_delay=5)
    enqueue(scheduler, queued())
    assert sizes(scheduler) == []
    scheduler.drain()
    assert sizes(scheduler) == [1]


def test_each_shape_gathers_a_batch_of_its_own_and_the_oldest_goes_first() -> None:
    scheduler = batcher()
    requests = [queued(shape=shape) for shape in "abacb"]
    enqueue(scheduler, *requests)
    assert scheduler.next(0).batch == [requests[0], requests[2]]
    assert scheduler.next(0).batch == [requests[1], requests[4]]
    assert scheduler.next(0).batch == [requests[3]]


def test_a_full_batch_of_another_shape_does_not_wait_for_the_oldest() -> None:
    scheduler = batcher(2, max_queue_delay=5)
    old, *pair = queued(shape="a"), queued(shape="b"), queued(shape="b")
    enqueue(scheduler, old, *pair)
    assert scheduler.next(1).batch == pair
    decision = scheduler.next(1)
    assert (decision.batch, decision.wake_at) == ([], 5)
    enqueue(scheduler, queued(shape="b"), queued(shape="b"), now=1)
    assert scheduler.next(5).batch == [old], "nothing starves: what is due goes before what came later"


def test_the_lower_level_goes_first_and_the_others_fill_its_batch() -> None:
    scheduler = batcher(4, priority_levels=2, default_priority_level=2)
    low = [queued(), queued(), queued()]
    high = [queued(priority=1), queued(priority=1, shape="b"), queued(priority=1)]
    enqueue(scheduler, *low, *high)
    assert scheduler.next(0).batch == [high[0], high[2], low[0], low[1]]
    assert scheduler.next(0).batch == [high[1]]
    assert scheduler.next(0).batch == [low[2]]


def test_batches_beyond_the_useful_size_are_made_only_if_the_config_prefers_them() -> None:
    for fields, expected in (
        ({}, [2, 2, 2, 1]),
        ({"preferred_batch_sizes": (4,)}, [4, 3]),
        ({"preferred_batch_sizes": (1,)}, [1] * 7),
    ):
        scheduler = batcher(8, 2, **fields)
        enqueue(scheduler, *(queued() for _ in range(7)))
        assert sizes(scheduler) == expected
    scheduler = batcher(8, 2)
    enqueue(scheduler, queued(1), queued(5), queued(1))
    assert sizes(scheduler) == [1, 5, 1]


@pytest.mark.parametrize(
    ("fields", "useful", "immediate"),
    [
        ({}, None, True),
        ({"preferred_batch_sizes": (4,)}, None, True),
        ({"priority_levels": 3, "default_priority_level": 1}, None, True),
        ({"max_queue_delay": 1}, None, False),
        ({"max_queue_delay": 1}, 1, True),
        ({"max_queue_delay": 1, "preferred_batch_sizes": (1,)}, None, True),
        ({"max_queue_delay": 1, "preferred_batch_sizes": (1, 2)}, None, False),
    ],
)
def test_immediate_where_a_lone_request_never_waits(
    *, fields: dict[str, Any], useful: int | None, immediate: bool
) -> None:
    assert batcher(8, useful, **fields).immediate is immediate
    if immediate:
        for rows in range(1, 9):
            scheduler = batcher(8, useful, **fields)
            enqueue(scheduler, queued(rows))
            assert sizes(scheduler) == [rows]


def test_cancelled_ones_are_not_run_and_harm_no_other() -> None:
    scheduler = batcher()
    requests = [queued() for _ in range(4)]
    enqueue(scheduler, *requests)
    requests[0].future.cancel()
    requests[2].future.cancel()
    assert scheduler.remove(requests[2])
    decision = scheduler.next(0)
    assert decision.batch == [requests[1], requests[3]]
    ((dropped, reason),) = decision.dropped
    assert dropped is requests[0]
    assert isinstance(reason, CanceledError)
    assert not scheduler.remove(requests[0])


def test_what_is_due_behind_a_cancelled_one_goes_before_what_came_later() -> None:
    scheduler = batcher(max_queue_delay=1, preferred_batch_sizes=(2,))
    cancelled, due, *later = (queued(shape=shape) for shape in "aabb")
    enqueue(scheduler, cancelled)
    enqueue(scheduler, due, now=0.25)
    cancelled.future.cancel()
    enqueue(scheduler, *later, now=0.5)
    assert scheduler.next(1.25).batch == [due]
    assert scheduler.next(1.25).batch == later


def test_nothing_but_dropped_ones_is_no_batch() -> None:
    scheduler = batcher()
    request = queued(deadline=1)
    enqueue(scheduler, request)
    decision = scheduler.next(1)
    assert decision.batch == []
    assert isinstance(decision.dropped[0][1], DeadlineExceededError)
    assert decision.wake_at is None


def test_a_timeout_wakes_before_the_delay() -> None:
    policy = QueuePolicy(REJECT, 2 * SECOND)
    scheduler = batcher(max_queue_delay=5, default_queue_policy=policy)
    enqueue(scheduler, queued())
    assert scheduler.next(0).wake_at == 2
    ((_, reason),) = scheduler.next(2).dropped
    assert isinstance(reason, UnavailableError)


def test_one_that_timed_out_and_is_delayed_goes_last_and_waits_for_none() -> None:
    policy = QueuePolicy(DELAY, 2 * SECOND)
    scheduler = batcher(2, max_queue_delay=5, default_queue_policy=policy)
    late, *fresh = (queued() for _ in range(3))
    enqueue(scheduler, late)
    enqueue(scheduler, *fresh, now=2)
    assert scheduler.next(2).batch == fresh
    assert scheduler.next(2).batch == [late]


# --- deadlines


def run(scheduler: DynamicBatcher, seconds: float, now: float, **fields: Any) -> None:
    enqueue(scheduler, queued(**fields), now=now)
    scheduler.finished(scheduler.next(now).batch, now + seconds)


def test_one_that_can_not_make_it_is_dropped_before_it_runs() -> None:
    scheduler = batcher()
    for i in range(5):
        run(scheduler, 0.2, i * 0.2)
    tight, enough = queued(deadline=1.1), queued(deadline=1.3)
    enqueue(scheduler, tight, enough, now=1)
    decision = scheduler.next(1)
    assert decision.batch == [enough]
    ((dropped, reason),) = decision.dropped
    assert dropped is tight
    assert isinstance(reason, DeadlineExceededError)
    assert "deadline is nearer than the 0.2 s that a run takes" in str(reason)


def test_one_slow_run_drops_nothing() -> None:
    scheduler = batcher()
    run(scheduler, 5, 0)
    for i in range(10):
        run(scheduler, 0.1, 5 + i * 0.1)
    enqueue(scheduler, queued(deadline=6.2), now=6)
    assert sizes(scheduler, 6) == [1]


def test_nothing_is_dropped_for_ever_after_slow_runs() -> None:
    scheduler = batcher()
    for i in range(40):
        run(scheduler, 1, i)
    outcomes = []
    for i in range(30):
        now = 40 + i * 0.1
        enqueue(scheduler, queued(deadline=now + 0.5), now=now)
        batch = scheduler.next(now).batch
        outcomes.append(bool(batch))
        if batch:
            scheduler.finished(batch, now + 0.01)
    assert not outcomes[0]
    # One is tried when nothing has run for a second; it shows that the model is fast again.
    assert all(outcomes[11:])


def test_what_other_shapes_and_larger_batches_take_says_nothing() -> None:
    times = RunTimes()
    for i in range(8):
        times.add("a", 4, i, i + 0.5)
    assert times.least("a", 4, 8) == 0.5
    assert times.least("a", 3, 8) == 0
    assert times.least("b", 4, 8) == 0
    assert times.least("a", 4, 9) == 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_the_slowest_is_that_of_the_last_runs(seconds: list[int]) -> None:
    times = RunTimes()
    for i, each in enumerate(seconds):
        times.add("a", 1, i, i + each)
        assert times.slowest == max(seconds[max(0, i - 31) : i + 1])


def test_a_deadline_is_not_waited_away() -> None:
    scheduler = batcher(max_queue_delay=5)
    enqueue(scheduler, queued(), queued(deadline=6))
    assert sizes(scheduler) == []
    enqueue(scheduler, queued(deadline=5), now=1)
    assert sizes(scheduler, 1) == [3]


# --- answers in order


@given(st.lists(st.integers(0, 9), max_size=10), st.randoms(use_true_random=False))
def test_answers_go_out_in_order_of_arrival(items: list[int], random: Any) -> None:
    in_order = InOrder()
    requests = [queued() for _ in items]
    for request in requests:
        in_order.expect(request)
    released: list[Any] = []
    shuffled = list(enumerate(requests))
    random.shuffle(shuffled)
    for i, request in shuffled:
        released += in_order.finish(request, i)
        released += in_order.finish(request, "again")
    assert released == [(request, i) for i, request in enumerate(requests)]
    assert len(in_order) == 0
    assert in_order.finish(queued(), 0) == []


# --- random schedules


@dataclass
class Waiting:
    """What the schedule knows of a request in the queue."""

    queued: QueuedRequest
    level: int
    arrived: float
    number: int
    timeout_at: float = math.inf
    delays: bool = False

    @property
    def deadline(self) -> float:
        deadline = self.queued.call.deadline
        return math.inf if deadline is None else deadline

    def late(self, now: float) -> bool:
        return self.delays and self.timeout_at <= now

    def expired(self, now: float) -> bool:
        return self.deadline <= now or (self.timeout_at <= now and not self.delays)

    def cancelled(self) -> bool:
        return self.queued.future.cancelled()

    def key(self, now: float) -> tuple[float, ...]:
        """Where it stands among those of its shape."""
        if self.late(now):
            return (self.level, 1, self.timeout_at, self.number)
        return (self.level, 0, self.arrived, self.number)

    def since(self, now: float) -> float:
        return -math.inf if self.late(now) else self.arrived


@dataclass
class Schedule:
    """A server's queue and instances without threads.

    Asks what to run when a request has come or was removed, when a run has ended, and at `wake_at`.
    """

    config: BatcherSettings
    useful: int | None
    instances: int
    now: float = 0.0
    waiting: list[Waiting] = field(default_factory=list)
    running: list[tuple[float, list[QueuedRequest]]] = field(default_factory=list)
    answers: dict[QueuedRequest, object] = field(default_factory=dict)
    arrived: list[QueuedRequest] = field(default_factory=list)
    released: list[QueuedRequest] = field(default_factory=list)
    slowest: float = 0.0
    wake_at: float | None = None
    refused: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        self.scheduler = DynamicBatcher(self.config, self.useful)
        self.in_order = InOrder()
        preferred = self.config.preferred_batch_sizes
        useful = self.useful or self.config.max_batch_size
        self.limit = min(self.config.max_batch_size, max((useful, *preferred)))
        self.preferred = preferred or (self.limit,)

    def policy(self, level: int) -> QueuePolicy:
        own = self.config.priority_queue_policy if self.config.priority_levels else {}
        return own.get(level, self.config.default_queue_policy)

    def answer(self, request: QueuedRequest, answer: object) -> None:
        assert request not in self.answers, "answered twice"
        self.answers[request] = answer
        self.released += [released for released, _ in self.in_order.finish(request, answer)]

    # What happens.

    def arrive(self, rows: int, shape: int, priority: int, timeout: int, deadline: int) -> None:
        parameters = {"priority": priority, "timeout": timeout * SECOND} if priority or timeout else {}
        request = queued(rows, shape, self.now + deadline if deadline else None, **parameters)
        levels = self.config.priority_levels
        level = (priority if 0 < priority <= levels else self.config.default_priority_level) if levels else 0
        policy = self.policy(level)
        seconds = policy.default_timeout_us / SECOND
        if policy.allow_timeout_override and timeout:
            seconds = min(seconds, timeout)
        item = Waiting(request, level, self.now, len(self.arrived))
        if seconds:
            item.timeout_at, item.delays = self.now + seconds, policy.timeout_action == DELAY
        in_queue = [w for w in self.waiting if w.level == level and not w.expired(self.now)]
        # A cancelled one may count until it is removed, or seen.
        most, least = len(in_queue), sum(not w.cancelled() for w in in_queue)
        try:
            self.scheduler.enqueue(request, self.now)
        except UnavailableError:
            assert 0 < policy.max_queue_size <= most, "refused although there was room"
            self.refused += 1
            return
        assert not 0 < policy.max_queue_size <= least, "the bound of the queue was passed"
        self.in_order.expect(request)
        self.arrived.append(request)
        self.waiting.append(item)
        self.ask()

    def cancel(self, choice: int, *, told: bool) -> None:
        """Cancel a request that waits; unless `told`, the instance is faster than the one who removes it."""
        if not self.waiting:
            return
        item = self.waiting[choice % len(self.waiting)]
        if item.queued.future.cancel() and told:
            assert self.scheduler.remove(item.queued)
            assert not self.scheduler.remove(item.queued)
            self.waiting.remove(item)
            self.answer(item.queued, CanceledError())
            self.ask()

    def end_run(self) -> None:
        if not self.running:
            return
        started, batch = self.running.pop(0)
        self.slowest = max(self.slowest, self.now - started)
        self.scheduler.finished(batch, self.now)
        for request in batch:
            self.answer(request, "ran")
        self.ask()

    def step(self, seconds: float) -> None:
        target = self.now + seconds
        while self.wake_at is not None and self.wake_at <= target and len(self.running) < self.instances:
            self.now, before = self.wake_at, self.wake_at
            self.ask()
            assert self.wake_at is None or self.wake_at > before, "woken for nothing"
        self.now = target
        if len(self.running) < self.instances:
            self.check_that_nothing_is_due()

    def ask(self) -> None:
        self.wake_at = None
        while len(self.running) < self.instances:
            decision = self.scheduler.next(self.now)
            self.check_dropped(decision.dropped)
            if not decision.batch:
                self.wake_at = decision.wake_at
                self.check_that_nothing_is_due()
                return
            self.check_batch(decision.batch)
            self.running.append((self.now, decision.batch))
            self.batches += 1

    def finish(self) -> None:
        """Let all that waits be answered."""
        self.ask()
        for _ in range(100):
            while self.running:
                self.end_run()
            if not self.waiting:
                break
            assert self.wake_at is not None, "something waits, and nothing is going to happen"
            self.step(self.wake_at - self.now)
        assert len(self.scheduler) == len(self.waiting) == 0
        assert set(self.answers) == set(self.arrived), "lost"
        assert self.released == self.arrived, "answers out of order"

    # What must hold.

    def alive(self) -> list[Waiting]:
        alive = [w for w in self.waiting if not w.cancelled() and not w.expired(self.now)]
        return sorted(alive, key=lambda w: w.key(self.now))

    def triton(self, line: list[Waiting]) -> int:
        """How many of a shape's requests Triton sends now, 0: it waits; `line` in the order of service."""
        total = list(itertools.accumulate(w.queued.rows for w in line))
        fit = max(1, sum(rows <= self.limit for rows in total))
        full = fit < len(line) or total[fit - 1] >= self.limit
        most, delay = max(self.preferred), self.config.max_queue_delay
        if delay and self.now >= min(w.since(self.now) for w in line) + delay:
            return fit
        reached = [k for k in range(1, fit + 1) if total[k - 1] in self.preferred]
        if reached:
            return reached[-1]
        passed = [k for k in range(1, fit + 1) if k < len(line) and total[k] > most]
        if passed:
            return passed[0]
        return fit if full or not delay or total[fit - 1] >= most else 0

    def check_dropped(self, dropped: list[tuple[QueuedRequest, ServeError]]) -> None:
        by_request = {w.queued: w for w in self.waiting}
        for request, reason in dropped:
            item = by_request[request]
            self.waiting.remove(item)
            self.answer(request, reason)
            if isinstance(reason, CanceledError):
                assert item.cancelled()
            elif isinstance(reason, DeadlineExceededError):
                assert item.deadline <= self.now + self.slowest
            else:
                assert isinstance(reason, UnavailableError)
                assert item.timeout_at <= self.now
                assert not item.delays
        assert not any(w.expired(self.now) for w in self.waiting), "the dead still wait"

    def check_batch(self, batch: list[QueuedRequest]) -> None:
        alive = self.alive()
        line = [w for w in alive if w.queued.shape == batch[0].shape]
        taken = line[: len(batch)]
        assert [w.queued for w in taken] == batch, "mixed shapes, a dead request, or out of order"
        assert sum(request.rows for request in batch) <= max(self.limit, batch[0].rows)
        expected = self.triton(line)
        if expected:
            # One further back that is cancelled may be overdue: then all goes that fits.
            assert len(batch) >= expected
            assert len(batch) == expected or self.config.max_queue_delay
        else:
            latest = min(w.since(self.now) for w in line) + self.config.max_queue_delay + self.slowest
            assert any(w.deadline <= latest for w in taken), "sent too early"
        for shape in {w.queued.shape for w in alive} - {batch[0].shape}:
            other = [w for w in alive if w.queued.shape == shape]
            if other[0].key(self.now)[:3] < line[0].key(self.now)[:3]:
                assert not self.triton(other), "passed over one that was due"
        self.waiting = [w for w in self.waiting if w not in taken]

    def check_that_nothing_is_due(self) -> None:
        alive, delay = self.alive(), self.config.max_queue_delay
        assert all(self.now < w.since(self.now) + delay for w in alive), "left waiting"
        # One that is cancelled, and not yet removed, may hide that the others make up a preferred size.
        hidden = {w.queued.shape for w in self.waiting if w.cancelled()}
        for shape in {w.queued.shape for w in alive} - hidden:
            assert not self.triton([w for w in alive if w.queued.shape == shape]), "left waiting"


small = st.integers(0, 3)
policies = st.builds(
    QueuePolicy, st.sampled_from([REJECT, DELAY]), small.map(SECOND.__mul__), st.booleans(), small
)
configs = st.builds(
    BatcherSettings,
    max_batch_size=st.just(6),
    preferred_batch_sizes=st.sampled_from([(), (), (2,), (4,), (2, 5), (1, 6), (6,)]),
    max_queue_delay=st.sampled_from([0, 0, 1, 2, 4]),
    priority_levels=st.sampled_from([0, 0, 2, 3]),
    default_priority_level=st.sampled_from([1, 2]),
    default_queue_policy=st.just(QueuePolicy()) | policies,
    priority_queue_policy=st.just({}) | st.builds(lambda policy: {1: policy}, policies),
)
# An event is two bytes, three bits for what happens and ten for how: lists of tuples take minutes to draw.
ARRIVE, CANCEL, END_RUN, STEP = range(4)
KINDS = (ARRIVE, ARRIVE, ARRIVE, ARRIVE, CANCEL, END_RUN, END_RUN, STEP)
ROWS, PRIORITIES, TIMEOUTS, DEADLINES = (1, 1, 2, 4), (0, 1, 2, 3), (0, 0, 1, 2), (0, 0, 2, 6)
STEPS = (0.5, 1, 1.5, 4)


def happen(schedule: Schedule, first: int, second: int) -> None:
    kind, how = KINDS[first % 8], (first // 8, second % 4, second // 4 % 4, second // 16 % 4, second // 64)
    if kind == ARRIVE:
        rows, shape = ROWS[how[0] % 4], how[1] % 3
        schedule.arrive(rows, shape, PRIORITIES[how[2]], TIMEOUTS[how[3]], DEADLINES[how[4]])
    elif kind == CANCEL:
        schedule.cancel(how[0], told=how[1] > 0)
    elif kind == END_RUN:
        schedule.end_run()
    else:
        schedule.step(STEPS[how[1]])


def test_10_000_random_schedules_keep_every_invariant() -> None:
    count = {"schedules": 0, "requests": 0, "refused": 0, "batches": 0, "ran": 0, "dropped": 0}

    @settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        configs, st.sampled_from([None, None, 1, 3]), st.integers(1, 2), st.binary(min_size=20, max_size=70)
    )
    def play(config: BatcherSettings, useful: int | None, instances: int, events: bytes) -> None:
        schedule = Schedule(config, useful, instances)
        for first, second in zip(events[::2], events[1::2], strict=False):
            happen(schedule, first, second)
        schedule.finish()
        count["schedules"] += 1
        count["requests"] += len(schedule.arrived)
        count["refused"] += schedule.refused
        count["batches"] += schedule.batches
        count["ran"] += sum(answer == "ran" for answer in schedule.answers.values())
        count["dropped"] += sum(isinstance(answer, ServeError) for answer in schedule.answers.values())

    play()
    print(count)
    assert count["schedules"] >= 10_000
