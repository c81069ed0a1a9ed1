"""The queue of a dynamic batcher: priority levels, each with its bound and its timeouts.

As Triton's PriorityQueue and PolicyQueue (model_config.proto: ModelDynamicBatching, ModelQueuePolicy). Pure,
the clock is passed in. Adding and removing a request cost the same however many wait.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, ModelLoadError, UnavailableError
from serve.pb import model_config_pb2 as pb
from serve.scheduling.expiries import Expiries
from serve.scheduling.scheduler import drop_reason

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from serve.errors import ServeError
    from serve.request import Parameter
    from serve.scheduling.scheduler import QueuedRequest

REJECT = pb.ModelQueuePolicy.REJECT
DELAY = pb.ModelQueuePolicy.DELAY

# Empty levels that are kept: a config may allow more levels than memory holds.
_KEPT_LEVELS = 64


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """What a priority level does with requests that wait too long, and how many may wait.

    Attributes:
        timeout_action: REJECT or DELAY.
        default_timeout_us: microseconds in the queue; 0: no limit.
        allow_timeout_override: a request's `timeout` parameter may shorten the default. It can't lengthen it,
            nor set one where there is none.
        max_queue_size: requests; 0: no limit.
    """

    timeout_action: int = REJECT
    default_timeout_us: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0

    @classmethod
    def from_config(cls, policy: pb.ModelQueuePolicy) -> QueuePolicy:
        """The policy of a config's message.

        Raises:
            ModelLoadError: the timeout action is none that there is.
        """
        if policy.timeout_action not in (REJECT, DELAY):
            raise ModelLoadError(
                f"config.pbtxt: a queue policy's timeout_action is {policy.timeout_action}, "
                "expected REJECT or DELAY"
            )
        return cls(
            policy.timeout_action,
            policy.default_timeout_microseconds,
            policy.allow_timeout_override,
            policy.max_queue_size,
        )


class ShapeQueue:
    """Requests of one shape in the order in which they are served.

    Attributes:
        fifo: request to the time since which it waits for others to join it, seconds.
        rows: of all of them.
        deadline: no request's is earlier; one that has left may have set it.
    """

    __slots__ = ("deadline", "fifo", "rows")

    def __init__(self) -> None:
        # Not a plain dict: finding its first key passes over every slot that was deleted in front of it.
        self.fifo: OrderedDict[QueuedRequest, float] = OrderedDict()
        self.rows = 0
        self.deadline = math.inf


class Lane:
    """Requests in the order in which they are served: all of them, and those of each shape."""

    __slots__ = ("by_shape", "order")

    def __init__(self) -> None:
        self.order: OrderedDict[QueuedRequest, float] = OrderedDict()
        self.by_shape: dict[Hashable, ShapeQueue] = {}

    def add(self, queued: QueuedRequest, since: float) -> None:
        """Add a request at the end, which waits for others since then, seconds."""
        self.order[queued] = since
        same = self.by_shape.get(queued.shape)
        if same is None:
            same = self.by_shape[queued.shape] = ShapeQueue()
        same.fifo[queued] = since
        same.rows += queued.rows
        deadline = queued.call.deadline
        if deadline is not None and deadline < same.deadline:
            same.deadline = deadline

    def remove(self, queued: QueuedRequest) -> None:
        """Take a request out."""
        del self.order[queued]
        same = self.by_shape[queued.shape]
        del same.fifo[queued]
        if same.fifo:
            same.rows -= queued.rows
        else:
            del self.by_shape[queued.shape]


class PolicyQueue:
    """One priority level: those in time, in order of arrival, and behind them those that timed out."""

    __slots__ = ("_timeout", "delays", "in_time", "late", "policy")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.in_time = Lane()
        self.late = Lane()
        self._timeout = policy.default_timeout_us / 1e6
        self.delays = policy.timeout_action == DELAY

    def __len__(self) -> int:
        return len(self.in_time.order) + len(self.late.order)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """In the order in which they are served."""
        return (self.in_time, self.late) if self.delays else (self.in_time,)

    def timeout(self, wanted_us: int) -> float:
        """How long a request may wait, seconds (0: forever), that asks for `wanted_us` (0: doesn't)."""
        if wanted_us > 0 and self.policy.allow_timeout_override:
            return min(self._timeout, wanted_us / 1e6)
        return self._timeout

    def remove(self, queued: QueuedRequest) -> None:
        """Take a request of this level out."""
        lane = self.in_time if queued in self.in_time.order else self.late
        lane.remove(queued)

    def move_back(self, queued: QueuedRequest) -> None:
        """Put a request whose time is over behind all others of the level; it waits for none to join it."""
        self.in_time.remove(queued)
        self.late.add(queued, -math.inf)


class PriorityQueue:
    """All levels: the lower the number, the sooner it is served.

    A request expires at its deadline or its timeout, whichever comes first. Those that expired leave when the
    queue is told to let them (`expire`), and when a full level needs their place.

    Attributes:
        lanes: in the order in which they are served.
        levels: how many there are; 0: requests have no priorities.
    """

    def __init__(
        self,
        default_policy: QueuePolicy,
        levels: int = 0,
        default_level: int = 0,
        policies: Mapping[int, QueuePolicy] = MappingProxyType({}),
    ) -> None:
        """Make the queue; `policies` are those of levels that don't have the default one."""
        self.levels = levels
        self.lanes: list[Lane] = []
        self._default_policy = default_policy
        self._policies = policies if levels else {}
        self._default_level = default_level if levels else 0
        self._by_level: dict[int, PolicyQueue] = {}
        self._expiries: Expiries[QueuedRequest] = Expiries()
        # Of each request its level and the number of its expiry, 0: it doesn't expire.
        self._places: dict[QueuedRequest, tuple[PolicyQueue, int]] = {}
        self._dropped: list[tuple[QueuedRequest, ServeError]] = []
        self._open(self._default_level)

    def __len__(self) -> int:
        return len(self._places) + len(self._dropped)

    @property
    def waiting(self) -> int:
        """How many may still be run."""
        return len(self._places)

    def enqueue(self, queued: QueuedRequest, now: float) -> None:
        """Add a request, `now` in seconds on the deadlines' clock.

        A `priority` that is 0 or above the levels is the default one, as in Triton.

        Raises:
            InvalidArgumentError: its `priority` or `timeout` parameter is no integer.
            UnavailableError: its level is full.
        """
        level, wanted_us = self._default_level, 0
        parameters = queued.request.parameters
        if parameters:
            wanted_us = _parameter(parameters, "timeout")
            priority = _parameter(parameters, "priority")
            if 0 < priority <= self.levels:
                level = priority
        policy_queue = self._by_level.get(level)
        if policy_queue is None:
            policy_queue = self._open(level)
        bound = policy_queue.policy.max_queue_size
        if bound and len(policy_queue) >= bound:
            self.expire(now)
            if len(policy_queue) >= bound:
                raise UnavailableError(
                    f"model '{queued.request.model_name}': Exceeds maximum queue size, {bound} requests wait"
                )
        policy_queue.in_time.add(queued, now)
        expiry = queued.call.deadline
        timeout = policy_queue.timeout(wanted_us)
        if timeout and (expiry is None or now + timeout < expiry):
            expiry = now + timeout
        self._places[queued] = (policy_queue, 0 if expiry is None else self._expiries.add(expiry, queued))

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a request out; whether it was there."""
        if queued in self._places:
            self._leave(queued)
            return True
        kept = [dropped for dropped in self._dropped if dropped[0] is not queued]
        found = len(kept) < len(self._dropped)
        self._dropped = kept
        return found

    def take(self, batch: Sequence[QueuedRequest]) -> None:
        """Take requests out that are to be run."""
        for queued in batch:
            self._leave(queued)

    def drop(self, queued: QueuedRequest, reason: ServeError) -> None:
        """Have a request that waits answered with an error."""
        self.remove(queued)
        self._dropped.append((queued, reason))

    def expire(self, now: float) -> None:
        """Drop, or move back, those whose deadline or timeout is not after `now`."""
        for queued in self._expiries.take_expired(now):
            policy_queue, _ = self._places[queued]
            deadline = queued.call.deadline
            reason = drop_reason(queued, now)
            if reason is not None:
                self.drop(queued, reason)
            elif policy_queue.delays:
                policy_queue.move_back(queued)
                number = 0 if deadline is None else self._expiries.add(deadline, queued)
                self._places[queued] = (policy_queue, number)
            else:
                name = queued.request.model_name
                self.drop(queued, UnavailableError(f"model '{name}': Request timeout expired"))

    def take_dropped(self) -> list[tuple[QueuedRequest, ServeError]]:
        """Those dropped since the last time, with what answers them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def next_expiry(self) -> float | None:
        """When the next request expires, seconds; None: none will."""
        return self._expiries.first()

    def _open(self, level: int) -> PolicyQueue:
        """Add a level, and let empty ones go when there are many."""
        if len(self._by_level) >= _KEPT_LEVELS:
            self._by_level = {number: queue for number, queue in self._by_level.items() if len(queue)}
        opened = self._by_level[level] = PolicyQueue(self._policies.get(level, self._default_policy))
        self.lanes = [lane for number in sorted(self._by_level) for lane in self._by_level[number].lanes]
        return opened

    def _leave(self, queued: QueuedRequest) -> None:
        policy_queue, number = self._places.pop(queued)
        policy_queue.remove(queued)
        if number:
            self._expiries.discard(number)


def _parameter(parameters: Mapping[str, Parameter], name: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int:
        raise InvalidArgumentError(f"parameter '{name}' is {value!r}, expected an integer")
    return value
