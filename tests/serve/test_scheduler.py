"""The default scheduler's decisions, with a clock of the test's own."""

from __future__ import annotations

from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from serve.request import Call, InferRequest
from serve.scheduler import DefaultScheduler, QueuedRequest


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
        scheduler.enqueue(item)
        if cancel:
            item.future.cancel()
    run, dropped = [], []
    while len(scheduler):
        decision = scheduler.next(now)
        run += [decision.run] if decision.run else []
        dropped += decision.dropped
    alive = [
        item
        for item, (deadline, cancel) in zip(items, requests, strict=True)
        if not cancel and (deadline is None or deadline > now)
    ]
    assert run == alive
    assert dropped == [item for item in items if item not in alive]


def test_an_empty_queue_has_nothing_to_do() -> None:
    decision = DefaultScheduler().next(0)
    assert decision.run is None
    assert decision.dropped == []
