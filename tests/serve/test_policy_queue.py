"""Priority levels, bounds and timeouts of a dynamic batcher's queue, with a clock of the test's own."""

from __future__ import annotations

import gc
import math
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    InvalidArgumentError,
    ModelLoadError,
    UnavailableError,
)
from serve.pb import model_config_pb2 as pb
from serve.request import Call, InferRequest
from serve.scheduling.expiries import Expiries
from serve.scheduling.policy_queue import DELAY, REJECT, PriorityQueue, QueuePolicy
from serve.scheduling.scheduler import QueuedRequest

if TYPE_CHECKING:
    from serve.request import Parameter

SECOND = 1_000_000


def queued(deadline: float | None = None, shape: object = (), **parameters: Parameter) -> QueuedRequest:
    request = InferRequest("m", "", (), parameters=parameters)
    return QueuedRequest(request, Call(deadline), Future(), 1, shape)


def order(queue: PriorityQueue) -> list[QueuedRequest]:
    """The requests that wait, in the order in which they would be served."""
    return [request for lane in queue.lanes for request in lane.order]


def test_a_policy_is_read_from_the_config() -> None:
    message = pb.ModelQueuePolicy(
        timeout_action=DELAY,
        default_timeout_microseconds=2,
        allow_timeout_override=True,
        max_queue_size=3,
    )
    assert QueuePolicy.from_config(message) == QueuePolicy(
        DELAY, 2, allow_timeout_override=True, max_queue_size=3
    )
    assert QueuePolicy.from_config(pb.ModelQueuePolicy()) == QueuePolicy()


def test_an_unknown_timeout_action_is_refused() -> None:
    message = pb.ModelQueuePolicy.FromString(b"\x08\x07")
    with pytest.raises(ModelLoadError, match="timeout_action is 7, expected REJECT or DELAY"):
        QueuePolicy.from_config(message)


def test_requests_of_one_level_wait_in_order_of_arrival() -> None:
    queue = PriorityQueue(QueuePolicy())
    requests = [queued(shape=i % 3) for i in range(6)]
    for request in requests:
        queue.enqueue(request, 0)
    assert order(queue) == requests
    assert list(queue.lanes[0].by_shape[1].fifo) == [requests[1], requests[4]]
    assert len(queue) == 6


@pytest.mark.parametrize(
    ("levels", "priority", "level"),
    [(3, 1, 1), (3, 3, 3), (3, 0, 2), (3, 4, 2), (3, 2**64 - 1, 2), (0, 7, 0), (2**63, 2**62, 2**62)],
)
def test_a_priority_without_a_level_is_the_default_one(levels: int, priority: int, level: int) -> None:
    queue = PriorityQueue(QueuePolicy(), levels, 2)
    first, second, request = queued(), queued(priority=1), queued(priority=priority)
    for each in (first, second, request):
        queue.enqueue(each, 0)
    by_level = {first: 2, second: 1, request: level} if levels else {first: 0, second: 0, request: 0}
    assert order(queue) == sorted([first, second, request], key=lambda each: by_level[each])


def test_levels_have_policies_of_their_own() -> None:
    queue = PriorityQueue(QueuePolicy(max_queue_size=1), 2, 1, {2: QueuePolicy(max_queue_size=2)})
    queue.enqueue(queued(), 0)
    queue.enqueue(queued(priority=2), 0)
    queue.enqueue(queued(priority=2), 0)
    for priority in (1, 2):
        with pytest.raises(UnavailableError, match="Exceeds maximum queue size"):
            queue.enqueue(queued(priority=priority), 0)
    assert len(queue) == 3


def test_a_level_of_any_number_costs_nothing_when_it_is_empty() -> None:
    queue = PriorityQueue(QueuePolicy(), 2**62, 1)
    stays = queued(priority=2**61)
    queue.enqueue(stays, 0)
    for priority in range(1, 1000):
        request = queued(priority=priority)
        queue.enqueue(request, 0)
        queue.take([request])
    assert len(queue.lanes) < 100
    assert order(queue) == [stays]


@pytest.mark.parametrize("name", ["timeout", "priority"])
@pytest.mark.parametrize("value", [1.5, "1", True])
def test_a_parameter_that_is_no_number_is_refused(name: str, value: Parameter) -> None:
    queue = PriorityQueue(QueuePolicy(), 3, 2)
    with pytest.raises(InvalidArgumentError, match=f"'{name}' is .*, expected an integer"):
        queue.enqueue(queued(None, (), **{name: value}), 0)
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("default", "override", "wanted", "expires"),
    [
        (2, True, 0, 2),
        (2, True, 1, 1),
        (2, True, 3, 2),
        (2, False, 1, 2),
        (0, True, 1, None),
        (0, True, 0, None),
    ],
)
def test_a_request_may_only_shorten_the_default_timeout(
    *, default: int, override: bool, wanted: int, expires: float | None
) -> None:
    queue = PriorityQueue(QueuePolicy(REJECT, default * SECOND, override))
    queue.enqueue(queued(timeout=wanted * SECOND), 10)
    assert queue.next_expiry() == (None if expires is None else 10 + expires)


def test_rejected_at_the_timeout() -> None:
    queue = PriorityQueue(QueuePolicy(REJECT, 5 * SECOND, allow_timeout_override=True))
    first, second = queued(), queued(timeout=SECOND)
    queue.enqueue(first, 0)
    queue.enqueue(second, 0)
    queue.expire(0.999)
    assert queue.take_dropped() == []
    queue.expire(1)
    ((dropped, reason),) = queue.take_dropped()
    assert dropped is second
    assert isinstance(reason, UnavailableError)
    assert "Request timeout expired" in str(reason)
    assert order(queue) == [first]


def test_delayed_at_the_timeout_behind_its_own_level_only() -> None:
    queue = PriorityQueue(QueuePolicy(DELAY, 5 * SECOND, allow_timeout_override=True), 2, 1)
    late, later, in_time, low = (
        queued(timeout=SECOND),
        queued(timeout=2 * SECOND),
        queued(),
        queued(priority=2),
    )
    for request in (low, later, late, in_time):
        queue.enqueue(request, 0)
    queue.expire(3)
    assert order(queue) == [in_time, late, later, low]
    assert queue.take_dropped() == []
    queue.expire(1000)
    assert order(queue) == [late, later, in_time, low]
    assert queue.next_expiry() is None
    assert queue.remove(late)
    assert order(queue) == [later, in_time, low]


def test_a_delayed_request_still_has_its_deadline() -> None:
    queue = PriorityQueue(QueuePolicy(DELAY, SECOND))
    queue.enqueue(queued(deadline=3), 0)
    queue.expire(1)
    assert len(order(queue)) == 1
    assert queue.next_expiry() == 3
    queue.expire(3)
    ((_, reason),) = queue.take_dropped()
    assert isinstance(reason, DeadlineExceededError)
    assert len(queue) == 0


def test_a_full_level_makes_room_of_those_that_expired() -> None:
    queue = PriorityQueue(QueuePolicy(max_queue_size=2))
    dead, alive, new = queued(deadline=1), queued(deadline=9), queued()
    queue.enqueue(dead, 0)
    queue.enqueue(alive, 0)
    with pytest.raises(UnavailableError, match="Exceeds maximum queue size"):
        queue.enqueue(queued(), 0.5)
    queue.enqueue(new, 1)
    assert order(queue) == [alive, new]
    assert len(queue) == 3, "the dead one waits for its answer"
    assert [request for request, _ in queue.take_dropped()] == [dead]
    assert len(queue) == 2


def test_the_timed_out_count_for_the_bound_of_a_level_that_delays() -> None:
    queue = PriorityQueue(QueuePolicy(DELAY, SECOND, max_queue_size=1))
    queue.enqueue(queued(), 0)
    with pytest.raises(UnavailableError, match="Exceeds maximum queue size"):
        queue.enqueue(queued(), 2)


def test_a_cancelled_request_leaves_once() -> None:
    queue = PriorityQueue(QueuePolicy(max_queue_size=1))
    request, expired = queued(), queued(deadline=1)
    queue.enqueue(request, 0)
    assert queue.remove(request)
    assert not queue.remove(request)
    queue.enqueue(expired, 0)
    queue.expire(1)
    assert queue.remove(expired), "dropped, and not yet answered"
    assert queue.take_dropped() == []
    assert len(queue) == 0
    assert queue.lanes[0].by_shape == {}


def test_one_cancelled_and_expired_is_cancelled() -> None:
    queue = PriorityQueue(QueuePolicy())
    request = queued(deadline=1)
    queue.enqueue(request, 0)
    request.future.cancel()
    queue.expire(1)
    ((_, reason),) = queue.take_dropped()
    assert isinstance(reason, CanceledError)


def test_a_request_that_left_is_not_kept_in_memory_by_its_deadline() -> None:
    queue = PriorityQueue(QueuePolicy())
    request = queued(deadline=1e9)
    alive = weakref.ref(request.future)
    queue.enqueue(request, 0)
    queue.take([request])
    del request
    gc.collect()
    assert alive() is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20), st.integers(0, 5))
def test_expiries_come_in_order_and_without_those_taken_out(items: list[tuple[int, bool]], now: int) -> None:
    expiries: Expiries[int] = Expiries()
    numbers = [expiries.add(time, i) for i, (time, _) in enumerate(items)]
    for number, (_, discard) in zip(numbers, items, strict=True):
        if discard:
            expiries.discard(number)
    left = sorted((time, i) for i, (time, discard) in enumerate(items) if not discard)
    assert expiries.first() == (left[0][0] if left else None)
    assert expiries.take_expired(now) == [i for time, i in left if time <= now]
    assert expiries.take_expired(math.inf) == [i for time, i in left if time > now]


def test_expiries_of_what_is_gone_take_no_room() -> None:
    expiries: Expiries[int] = Expiries()
    expiries.add(1e9, -1)
    for i in range(10_000):
        expiries.discard(expiries.add(1e6 + i, i))
    assert len(expiries._entries) < 1000
    assert expiries.take_expired(math.inf) == [-1]
