"""The default scheduler's decisions, with a clock of the test's own."""

from __future__ import annotations

from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from serve.errors import CanceledError, DeadlineExceededError
from serve.request import Call, InferRequest
from serve.scheduling.scheduler import DefaultScheduler, QueuedRequest


def queued(deadline: float | None = None) -> QueuedRequest:
    return QueuedRequest(InferRequest("m", "", ()), Call(deadline), Future())


@given(
    st.lists(st.tuples(st.none() | st.integers(0, 10), st.booleans()), max_size=20),
    st.integers(0, 10),
)
def test_the_living_run_in_order_and_nothing_is_lost(
    requests: list[tuple[int | None, bool]], now: int
) -> None:
    scheduler = DefaultScheduler()
    items = [queued(deadline) for deadline, _ in requests]
    for item, (_, cancel) in zip(items, requests, strict=True):
        scheduler.enqueue(item, 0)
        if cancel:
            item.future.cancel()
    run, dropped = [], []
    while len(scheduler):
        decision = scheduler.next(now)
        assert len(decision.batch) <= 1
        run += decision.batch
        dropped += decision.dropped
        scheduler.finished(decision.batch, now)
    alive = [
        item
        for item, (deadline, cancel) in zip(items, requests, strict=True)
        if not cancel and (deadline is None or deadline > now)
    ]
    assert run == alive
    assert [item for item, _ in dropped] == [item for item in items if item not in alive]
    for item, reason in dropped:
        assert isinstance(reason, CanceledError if item.future.cancelled() else DeadlineExceededError)


def test_an_empty_queue_has_nothing_to_do() -> None:
    decision = DefaultScheduler().next(0)
    assert decision.batch == []
    assert decision.dropped == []
    assert decision.wake_at is None


def test_a_cancelled_request_leaves_at_once() -> None:
    scheduler = DefaultScheduler()
    first, second = queued(), queued()
    scheduler.enqueue(first, 0)
    scheduler.enqueue(second, 0)
    assert scheduler.remove(first)
    assert not scheduler.remove(first)
    assert scheduler.next(0).batch == [second]
    assert not scheduler.remove(second)
