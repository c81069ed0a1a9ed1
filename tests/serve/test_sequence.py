"""The sequence scheduler's decisions and its settings, with a clock of the test's own."""

from __future__ import annotations

import time
from concurrent.futures import Future
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ModelLoadError,
    UnavailableError,
)
from serve.pb import model_config_pb2 as pb
from serve.request import Call, InferRequest
from serve.scheduling.executor import Executor
from serve.scheduling.scheduler import QueuedRequest
from serve.scheduling.sequence import SequenceScheduler
from serve.scheduling.sequence_config import SequenceSettings

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from serve.errors import ServeError
    from serve.scheduling.live_sequences import LiveSequence

IDLE = 10.0


def scheduler(**changes: Any) -> SequenceScheduler:
    return SequenceScheduler(
        SequenceSettings(**{"max_idle": IDLE, "slots": 4, "max_rows": 4, "max_live": 100, **changes})
    )


def request(
    name: int | str | None,
    *,
    start: bool = False,
    end: bool = False,
    rows: int = 1,
    shape: Hashable = (),
    deadline: float | None = None,
    timeout: int = 0,
) -> QueuedRequest:
    parameters = {"sequence_id": name, "sequence_start": start, "sequence_end": end, "timeout": timeout}
    if name is None:
        del parameters["sequence_id"]
    asked = InferRequest("m", "", (), parameters=parameters)  # type: ignore[arg-type] # None was removed
    return QueuedRequest(asked, Call(deadline), Future(), rows, shape)


def finish(
    sequences: SequenceScheduler, batch: Sequence[QueuedRequest], now: float, error: Exception | None = None
) -> None:
    for queued in batch:
        if queued.future.cancelled():
            continue
        if error is None:
            queued.future.set_result(None)  # type: ignore[arg-type] # nobody looks at it
        else:
            queued.future.set_exception(error)
    sequences.finished(batch, now)


def begun(sequences: SequenceScheduler, *names: int | str, now: float = 0.0) -> None:
    """Have sequences whose first requests have been answered."""
    for name in names:
        sequences.enqueue(request(name, start=True), now)
    while len(sequences):
        finish(sequences, sequences.next(now).batch, now)


def cancel(sequences: SequenceScheduler, queued: QueuedRequest) -> bool:
    return queued.future.cancel() and sequences.remove(queued)


# What is refused


@pytest.mark.parametrize("name", [None, 0, ""])
def test_a_request_without_a_sequence_is_refused(name: int | str | None) -> None:
    with pytest.raises(InvalidArgumentError, match="must specify a non-zero or non-empty correlation ID"):
        scheduler().enqueue(request(name, start=True), 0)


def test_a_sequence_must_begin_with_start() -> None:
    sequences = scheduler()
    with pytest.raises(InvalidArgumentError, match="sequence 7 to model 'm' must specify the START flag"):
        sequences.enqueue(request(7), 0)
    assert (len(sequences), sequences.live) == (0, 0)


def test_a_request_has_one_row() -> None:
    with pytest.raises(InvalidArgumentError, match="must specify batch-size 1"):
        scheduler().enqueue(request(7, start=True, rows=2), 0)


def test_a_number_is_another_sequence_than_its_text() -> None:
    sequences = scheduler()
    begun(sequences, 1)
    with pytest.raises(InvalidArgumentError):
        sequences.enqueue(request("1"), 0)


def test_an_id_has_a_longest() -> None:
    begun(scheduler(), "é" * 64)
    with pytest.raises(InvalidArgumentError, match="130 bytes, expected 128 at most"):
        scheduler().enqueue(request("é" * 65, start=True), 0)


def test_too_many_sequences_are_unavailable_until_one_has_ended() -> None:
    sequences = scheduler(max_live=2)
    begun(sequences, 1, 2)
    with pytest.raises(UnavailableError, match="2 live sequences"):
        sequences.enqueue(request(3, start=True), 0)
    sequences.enqueue(request(2, start=True), 0)  # begins no further one
    sequences.enqueue(request(1, end=True), 0)
    with pytest.raises(UnavailableError):
        sequences.enqueue(request(3, start=True), 0)
    finish(sequences, sequences.next(0).batch, 0)
    begun(sequences, 3)
    assert sequences.live == 2


# Order and batches


def test_sequences_run_together_and_each_of_them_in_order() -> None:
    sequences = scheduler()
    sent = {name: [request(name, start=i == 0, end=i == 2) for i in range(3)] for name in (1, 2)}
    for i in range(3):
        for name in sent:
            sequences.enqueue(sent[name][i], 0)
    for i in range(3):
        batch = sequences.next(0).batch
        assert batch == [sent[1][i], sent[2][i]]
        assert sequences.next(0).batch == []  # their next ones have to wait for these
        finish(sequences, batch, 0)
    assert (len(sequences), sequences.live) == (0, 0)


def test_only_equal_shapes_run_together() -> None:
    sequences = scheduler()
    for name, shape in ((1, "a"), (2, "b"), (3, "a")):
        sequences.enqueue(request(name, start=True, shape=shape), 0)
    assert [q.shape for q in sequences.next(0).batch] == ["a", "a"]
    assert [q.shape for q in sequences.next(0).batch] == ["b"]


def test_states_of_different_shapes_do_not_run_together() -> None:
    sequences = scheduler()
    begun(sequences, 1, 2)
    for name in (1, 2):
        sequences.enqueue(request(name), 0)
    batch = sequences.next(0).batch
    for queued, shape in zip(batch, ((2,), (3,)), strict=True):
        queued.sequence.sequence.state_shape = shape
    finish(sequences, batch, 0)
    for name in (1, 2):
        sequences.enqueue(request(name), 0)
    assert len(sequences.next(0).batch) == 1


def test_a_start_ends_the_sequence_that_has_the_id(caplog: pytest.LogCaptureFixture) -> None:
    sequences = scheduler()
    begun(sequences, 1)
    old = request(1)
    sequences.enqueue(old, 0)
    sequences.enqueue(request(1, start=True), 0)
    assert "sequence 1 starts again before its END" in caplog.text
    first = sequences.next(0).batch
    assert first == [old]
    old.sequence.sequence.state = "old"
    finish(sequences, first, 0)
    (new,) = sequences.next(0).batch
    assert new.sequence.sequence.state is None
    assert sequences.live == 1


def test_direct_keeps_the_rest_in_the_backlog_until_a_slot_is_free() -> None:
    sequences = scheduler(slots=2, max_rows=2)
    begun(sequences, 1, 2)
    waiting = [request(3, start=True), request(3), request(4, start=True)]
    for queued in waiting:
        sequences.enqueue(queued, 1)
    assert sequences.next(1).batch == []
    assert (len(sequences), sequences.live) == (3, 4)
    sequences.enqueue(request(2, end=True), 1)
    finish(sequences, sequences.next(1).batch, 1)
    batch = sequences.next(1).batch
    assert batch == [waiting[0]]  # 4 still waits: 1 and 3 have the slots
    finish(sequences, batch, 1)
    batch = sequences.next(1).batch
    assert batch == [waiting[1]]
    finish(sequences, batch, 1)
    last = request(3, end=True)
    for queued in (last, request(5, start=True)):
        sequences.enqueue(queued, 1)
    batch = sequences.next(1).batch
    assert batch == [last]
    finish(sequences, batch, 1)
    assert sequences.next(1).batch == [waiting[2]]  # 4 has 3's slot, and 5 waits
    assert sequences.next(1).batch == []


def test_direct_waits_for_its_share_of_the_slots() -> None:
    sequences = scheduler(max_queue_delay=1.0, minimum_slot_utilization=0.5)
    sequences.enqueue(request(1, start=True), 0)
    decision = sequences.next(0.5)
    assert (decision.batch, decision.wake_at) == ([], 1.0)
    sequences.enqueue(request(2, start=True), 0.5)
    assert len(sequences.next(0.5).batch) == 2
    sequences.enqueue(request(3, start=True), 2)
    assert len(sequences.next(3).batch) == 1


@pytest.mark.parametrize(
    "changes", [{"max_queue_delay": 1.0}, {"minimum_slot_utilization": 1.0}, {"oldest": True}]
)
def test_without_both_of_them_nothing_waits(changes: dict[str, Any]) -> None:
    sequences = scheduler(**changes)
    sequences.enqueue(request(1, start=True), 0)
    assert len(sequences.next(0).batch) == 1


def test_oldest_runs_preferred_sizes_at_once_and_others_after_the_delay() -> None:
    sequences = scheduler(oldest=True, slots=8, max_rows=6, preferred_sizes=(2, 4), max_queue_delay=1.0)
    sent = [request(name, start=True) for name in range(1, 8)]
    for queued in sent:
        sequences.enqueue(queued, 0)
    assert sequences.next(0).batch == sent[:4]
    assert sequences.next(0).batch == sent[4:6]
    decision = sequences.next(0)
    assert (decision.batch, decision.wake_at) == ([], 1.0)
    assert sequences.next(1).batch == sent[6:]


def test_the_longest_ready_goes_first() -> None:
    sequences = scheduler(oldest=True, slots=3, max_rows=1, preferred_sizes=(1,))
    for name in (1, 2, 3):
        for i in range(3):
            sequences.enqueue(request(name, start=i == 0), 0)
    order = []
    while len(sequences):
        batch = sequences.next(0).batch
        order += [queued.sequence.sequence.id for queued in batch]
        finish(sequences, batch, 0)
    assert order == [1, 2, 3] * 3


def test_preserved_order_is_one_run_at_a_time() -> None:
    sequences = scheduler(oldest=True, max_rows=1, preserve_ordering=True)
    sent = [request(name, start=True) for name in (1, 2)]
    for queued in sent:
        sequences.enqueue(queued, 0)
    first = sequences.next(0).batch
    assert sequences.next(0).batch == []
    finish(sequences, first, 0)
    assert sequences.next(0).batch == sent[1:]


# How sequences end early


def test_an_idle_sequence_ends() -> None:
    sequences = scheduler(slots=1)
    begun(sequences, 1, now=5.0)
    kept: LiveSequence = next(iter(sequences._sequences._open.values()))
    kept.state = "state"
    assert sequences.next(6).wake_at == 15
    sequences.next(14.9)
    assert sequences.live == 1
    assert sequences.next(15).wake_at is None
    assert (sequences.live, kept.state) == (0, None)
    with pytest.raises(InvalidArgumentError, match="START"):
        sequences.enqueue(request(1), 15)


def test_an_idle_sequence_ends_though_nobody_asked_in_between() -> None:
    sequences = scheduler()
    begun(sequences, 1)
    with pytest.raises(InvalidArgumentError, match="START"):
        sequences.enqueue(request(1), IDLE)
    assert sequences.live == 0


def test_the_time_of_a_run_and_of_the_queue_is_not_idle() -> None:
    sequences = scheduler(slots=1)
    begun(sequences, 1)
    sequences.enqueue(request(1), 1)
    batch = sequences.next(100).batch
    assert len(batch) == 1
    assert sequences.next(200).wake_at is None
    finish(sequences, batch, 300)
    sequences.enqueue(request(1), 309)
    assert len(sequences.next(309).batch) == 1


def test_an_idle_sequence_gives_its_slot_to_the_backlog() -> None:
    sequences = scheduler(slots=1)
    begun(sequences, 1)
    waiting = request(2, start=True)
    sequences.enqueue(waiting, 1)
    decision = sequences.next(1)
    assert (decision.batch, decision.wake_at) == ([], IDLE)
    assert sequences.next(IDLE).batch == [waiting]


def test_what_waits_too_long_in_the_backlog_is_unavailable() -> None:
    sequences = scheduler(slots=1)
    begun(sequences, 1)
    waiting = [request(2, start=True, timeout=3_000_000), request(2), request(3, start=True)]
    for queued in waiting:
        sequences.enqueue(queued, 0)
    assert sequences.next(0).wake_at == 3
    decision = sequences.next(3)
    assert [queued for queued, _ in decision.dropped] == waiting[:2]
    assert all(isinstance(error, UnavailableError) for _, error in decision.dropped)
    assert (len(sequences), sequences.live, decision.wake_at) == (1, 2, IDLE)
    with pytest.raises(InvalidArgumentError, match="START"):
        sequences.enqueue(request(2), 3)


def test_a_timeout_matters_in_the_backlog_alone() -> None:
    sequences = scheduler()
    queued = request(1, start=True, timeout=1)
    sequences.enqueue(queued, 0)
    assert sequences.next(1).batch == [queued]


@pytest.mark.parametrize("slots", [1, 2])
def test_cancelling_a_request_ends_its_sequence(slots: int) -> None:
    sequences = scheduler(slots=slots)
    begun(sequences, 1)
    sent = [request(2, start=i == 0) for i in range(4)]
    for queued in sent:
        sequences.enqueue(queued, 0)
    assert cancel(sequences, sent[1])
    decision = sequences.next(0)
    assert [queued for queued, _ in decision.dropped] == sent[2:]
    assert all(isinstance(error, CanceledError) for _, error in decision.dropped)
    with pytest.raises(InvalidArgumentError, match="START"):
        sequences.enqueue(request(2), 0)
    sequences.enqueue(request(1, end=True), 0)
    ran = decision.batch
    while len(sequences):
        batch = sequences.next(0).batch
        finish(sequences, batch, 0)
        ran = ran + batch
    assert sent[0] in ran


def test_what_begins_anew_behind_a_cancelled_request_runs() -> None:
    sequences = scheduler()
    sent = [request(1, start=True), request(1), request(1, start=True), request(1)]
    for queued in sent:
        sequences.enqueue(queued, 0)
    cancel(sequences, sent[0])
    decision = sequences.next(0)
    assert [queued for queued, _ in decision.dropped] == sent[1:2]
    assert decision.batch == sent[2:3]


def test_a_request_past_its_deadline_ends_its_sequence() -> None:
    sequences = scheduler()
    sent = [request(1, start=True, deadline=1.0), request(1, deadline=9.0)]
    for queued in sent:
        sequences.enqueue(queued, 0)
    decision = sequences.next(1)
    assert decision.batch == []
    assert [type(error) for _, error in decision.dropped] == [DeadlineExceededError, CanceledError]
    assert (len(sequences), sequences.live) == (0, 0)


def test_when_all_that_had_slots_are_dead_the_backlog_runs() -> None:
    sequences = scheduler(slots=1)
    sequences.enqueue(request(1, start=True, deadline=1.0), 0)
    sequences.enqueue(request(2, start=True, deadline=1.0), 0)
    living = request(3, start=True)
    sequences.enqueue(living, 0)
    decision = sequences.next(1)
    assert (decision.batch, len(decision.dropped)) == ([living], 2)


@pytest.mark.parametrize("error", [CanceledError("terminated"), DeadlineExceededError("terminated"), None])
def test_a_run_that_was_given_up_ends_its_sequence(error: Exception | None) -> None:
    sequences = scheduler()
    sequences.enqueue(request(1, start=True), 0)
    later = request(1)
    sequences.enqueue(later, 0)
    (running,) = sequences.next(0).batch
    if error is None:
        running.future.cancel()  # after it left the queue, before it ran
    finish(sequences, [running], 0, error)
    assert [queued for queued, _ in sequences.next(0).dropped] == [later]
    assert sequences.live == 0


def test_a_run_that_failed_leaves_its_sequence_as_it_was() -> None:
    sequences = scheduler()
    sequences.enqueue(request(1, start=True), 0)
    batch = sequences.next(0).batch
    batch[0].sequence.sequence.state = "state"
    finish(sequences, batch, 0)
    sequences.enqueue(request(1), 0)
    finish(sequences, sequences.next(0).batch, 0, InternalError("the graph failed"))
    sequences.enqueue(request(1), 0)
    (again,) = sequences.next(0).batch
    assert again.sequence.sequence.state == "state"


def test_what_is_not_queued_can_not_be_removed() -> None:
    sequences = scheduler()
    queued = request(1, start=True)
    assert not sequences.remove(queued)
    sequences.enqueue(queued, 0)
    sequences.next(0)
    assert not sequences.remove(queued)


def test_draining_runs_what_waits_and_waits_for_nobody() -> None:
    sequences = scheduler(slots=1)
    begun(sequences, 1)
    waiting = [request(2, start=True), request(3, start=True)]
    for queued in waiting:
        sequences.enqueue(queued, 0)
    sequences.drain()
    for queued in waiting:
        assert sequences.next(0).batch == [queued]
        finish(sequences, [queued], 0)
    sequences.next(0)
    assert (len(sequences), sequences.live) == (0, 0)
    with pytest.raises(UnavailableError, match="unloaded"):
        sequences.enqueue(request(4, start=True), 0)


# On the threads that serve it


def executor_of(sequences: SequenceScheduler) -> Executor:
    def run(batch: Sequence[QueuedRequest]) -> None:
        for queued in batch:
            queued.future.set_result(None)  # type: ignore[arg-type] # nobody looks at it

    def drop(queued: QueuedRequest, error: ServeError) -> None:
        if not queued.future.cancelled():
            queued.future.set_exception(error)

    return Executor("m", 1, sequences, run, drop)


def submitted(executor: Executor, queued: QueuedRequest) -> QueuedRequest:
    queued.call.future = queued.future
    executor.submit(queued, inline=False)
    return queued


def test_cancelling_answers_what_depends_on_it_though_nothing_can_run() -> None:
    executor = executor_of(scheduler(slots=1, max_idle=60.0))
    submitted(executor, request(1, start=True)).future.result(10)
    first, second = (submitted(executor, request(2, start=start)) for start in (True, False))
    first.call.cancel()
    with pytest.raises(CanceledError, match="an earlier request of it was given up"):
        second.future.result(10)
    executor.close()


def test_idle_sequences_end_without_traffic() -> None:
    sequences = scheduler(max_idle=0.05)
    executor = executor_of(sequences)
    submitted(executor, request(1, start=True)).future.result(10)
    give_up = time.monotonic() + 10
    while sequences.live:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    executor.close()


# Anything at all


class World:
    """A server around the scheduler: sends, runs, cancels, lets time pass; checks what must always hold."""

    def __init__(self, chosen: SequenceSettings, instances: int) -> None:
        self.settings = chosen
        self.scheduler = SequenceScheduler(chosen)
        self.instances = instances
        self.now = 0.0
        self.sent: dict[LiveSequence, list[QueuedRequest]] = {}
        self.running: list[list[QueuedRequest]] = []
        self.ran: list[QueuedRequest] = []
        self.failed: set[int] = set()
        self.dropped: list[QueuedRequest] = []
        self.cancelled: list[QueuedRequest] = []

    def send(self, name: int, changes: dict[str, Any], deadline: int) -> None:
        queued = request(name, deadline=self.now + deadline if deadline else None, **changes)
        try:
            self.scheduler.enqueue(queued, self.now)
        except (InvalidArgumentError, UnavailableError):
            assert queued.sequence is None
            return
        self.sent.setdefault(queued.sequence.sequence, []).append(queued)

    def run(self) -> float | None:
        """One decision; when to ask again."""
        if len(self.running) >= self.instances:
            return None
        decision = self.scheduler.next(self.now)
        self.dropped += [queued for queued, _ in decision.dropped]
        busy = {queued.sequence.sequence for batch in self.running for queued in batch}
        chosen = [queued.sequence.sequence for queued in decision.batch]
        assert len(set(chosen)) == len(chosen)
        assert not busy & set(chosen)
        assert len(chosen) <= self.settings.max_rows
        assert len({queued.shape for queued in decision.batch}) <= 1
        assert not any(q.call.expired(self.now) or q.future.cancelled() for q in decision.batch)
        assert not (self.settings.preserve_ordering and self.running and chosen)
        if decision.batch:
            self.running.append(decision.batch)
            self.ran += decision.batch
        slots = {s for s, sent in self.sent.items() if s.has_slot and (s.open or s.running or s.queue)}
        assert len(slots) <= self.settings.slots
        assert self.scheduler.live <= self.settings.max_live
        assert decision.wake_at is None or decision.wake_at > self.now
        return decision.wake_at

    def finish(self, which: int, error: Exception | None) -> None:
        if self.running:
            batch = self.running.pop(which % len(self.running))
            if isinstance(error, CanceledError):
                self.failed |= {id(queued) for queued in batch}
            finish(self.scheduler, batch, self.now, error)

    def cancel(self, which: int) -> None:
        waiting = [q for s in self.sent for q in s.queue]
        if waiting and cancel(self.scheduler, waiting[which % len(waiting)]):
            self.cancelled.append(waiting[which % len(waiting)])

    def settle(self) -> None:
        """Let everything that waits be answered, with no more time than the scheduler itself asks for."""
        for _ in range(1000):
            wake_at = self.run()
            if self.running:
                self.finish(0, None)
            elif not len(self.scheduler):
                return
            else:
                assert wake_at is not None, "requests wait and nobody will ask again"
                self.now = wake_at
        raise AssertionError("requests wait for ever")

    def check(self) -> None:
        everything = [queued for sent in self.sent.values() for queued in sent]
        answered = [*self.ran, *self.dropped, *self.cancelled]
        assert sorted(map(id, everything)) == sorted(map(id, answered))
        position = {id(queued): i for i, queued in enumerate(self.ran)}
        for sent in self.sent.values():
            ran = [position[id(queued)] for queued in sent if id(queued) in position]
            assert ran == sorted(ran)
            for earlier, later in pairwise(sent):
                if id(later) in position and not later.sequence.start:
                    # The state that it ran on is the one that its client expects.
                    assert id(earlier) in position
                    assert id(earlier) not in self.failed


numbers = st.integers(0, 3)
errors = st.sampled_from([None, None, InternalError("the graph failed"), CanceledError("terminated")])
flags = st.fixed_dictionaries({
    "start": st.sampled_from([True, True, False]),
    "end": st.sampled_from([False, False, True]),
    "shape": st.integers(0, 1),
    "timeout": st.sampled_from([0, 0, 3_000_000]),
})  # fmt: skip
actions = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 5), flags, st.sampled_from([0, 0, 0, 2])),
    *[st.tuples(st.just("run")), st.tuples(st.just("finish"), numbers, errors)] * 2,
    st.tuples(st.just("cancel"), numbers),
    st.tuples(st.just("wait"), st.integers(1, 12)),
)
strategies = st.one_of(
    st.fixed_dictionaries({"minimum_slot_utilization": st.sampled_from([0.0, 0.6, 1.0])}),
    st.fixed_dictionaries({
        "oldest": st.just(value=True),
        "preferred_sizes": st.sampled_from([(3,), (1, 2), (2,)]),
        "preserve_ordering": st.booleans(),
    }),
)  # fmt: skip


bounds = st.fixed_dictionaries({
    "slots": st.integers(1, 4),
    "max_live": st.integers(2, 5),
    "max_queue_delay": st.sampled_from([0.0, 1.5]),
})  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(strategies, bounds, st.integers(1, 2), st.lists(actions, min_size=10, max_size=60))
def test_whatever_happens_no_request_is_lost_and_no_state_is_wrong(
    strategy: dict[str, Any], limits: dict[str, Any], instances: int, todo: list[tuple[Any, ...]]
) -> None:
    chosen = SequenceSettings(max_idle=IDLE, max_rows=3, **limits, **strategy)
    world = World(chosen, instances)
    for action, *arguments in todo:
        if action == "wait":
            world.now += arguments[0]
        else:
            getattr(world, action)(*arguments)
    world.settle()
    world.check()
    world.now += IDLE
    world.run()
    assert world.scheduler.live == 0
    assert not any(sequence.open or sequence.state is not None for sequence in world.sent)


# config.pbtxt


def from_text(text: str, max_batch_size: int = 8, instances: int = 2) -> SequenceSettings:
    message = text_format.Parse(text, pb.ModelSequenceBatching())
    return SequenceSettings.from_config(message, max_batch_size, instances, 100)


def test_direct_has_a_slot_for_each_row_of_each_instance() -> None:
    found = from_text(
        "direct { max_queue_delay_microseconds: 2000 minimum_slot_utilization: 0.5 } "
        "max_sequence_idle_microseconds: 5000000"
    )
    assert found == SequenceSettings(
        5.0, slots=16, max_rows=8, max_live=100, max_queue_delay=0.002, minimum_slot_utilization=0.5
    )


def test_what_is_left_out_is_as_in_triton() -> None:
    assert from_text("", 0) == SequenceSettings(1.0, slots=2, max_rows=1, max_live=100)
    assert from_text("oldest { }").preferred_sizes == (8,)
    assert from_text("oldest { }").slots == 16


def test_oldest_has_its_candidates() -> None:
    found = from_text(
        "oldest { max_candidate_sequences: 50 preferred_batch_size: [4, 2, 4] preserve_ordering: true }"
    )
    assert (found.slots, found.preferred_sizes, found.preserve_ordering) == (100, (2, 4), True)


def test_controls_and_states() -> None:
    found = from_text("""
        control_input { name: "go" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
        control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
        state { input_name: "h" output_name: "h2" data_type: TYPE_FP32 dims: [-1, 4]
                initial_state { name: "i" data_type: TYPE_FP32 dims: [2, 4] data_file: "h0" }
                use_same_buffer_for_input_output: true }
    """)
    start, name = found.controls
    assert (start.name, start.kind, start.datatype.name, start.false_true) == ("go", "START", "INT32", (0, 1))
    assert (name.kind, found.id_datatype) == ("CORRID", name.datatype)
    (state,) = found.states
    assert (state.dims, state.initial_dims, state.initial_file) == ((-1, 4), (2, 4), "h0")
    assert found.first_state_shape == ((2, 4),)


def test_the_id_must_be_of_the_kind_that_the_graph_takes() -> None:
    text = 'control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }'
    with pytest.raises(InvalidArgumentError, match="sequence_id is 7, the model takes text"):
        SequenceScheduler(from_text(text)).enqueue(request(7, start=True), 0)


STATE = 'state { input_name: "h" output_name: "o" data_type: TYPE_FP32 dims: 4 %s }'


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("iterative_sequence: true", "iterative_sequence"),
        ("direct { minimum_slot_utilization: 1.5 }", "minimum_slot_utilization is 1.5, expected 0 to 1"),
        ("direct { minimum_slot_utilization: nan }", "direct.minimum_slot_utilization"),
        ("oldest { max_candidate_sequences: -1 }", "oldest.max_candidate_sequences"),
        ("oldest { preferred_batch_size: 9 }", "oldest.preferred_batch_size is 9, expected 1 to"),
        ("oldest { preferred_batch_size: 0 }", "oldest.preferred_batch_size"),
        ("control_input { control { kind: CONTROL_SEQUENCE_END } }", "control_input.name"),
        ('control_input { name: "s" }', "control_input 's' is of 0 controls"),
        ('control_input { name: "s" control { kind: CONTROL_SEQUENCE_END } }', "control_input 's'"),
        ('control_input { name: "s" control { int32_false_true: 1 } }', "expected two values"),
        (
            'control_input { name: "s" control { int32_false_true: [0, 1] fp32_false_true: [0, 1] } }',
            "expected two values",
        ),
        ('control_input { name: "s" control { kind: CONTROL_SEQUENCE_CORRID } }', "TYPE_INVALID"),
        (
            'control_input { name: "s" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } }',
            "TYPE_FP32",
        ),
        (
            ('control_input { name: "a" control { int32_false_true: [0, 1] } } '
             'control_input { name: "b" control { int32_false_true: [0, 1] } }'),
            "control_input.control.kind is 'START' twice",
        ),
        ('state { output_name: "o" data_type: TYPE_FP32 }', "state.input_name"),
        ('state { input_name: "h" data_type: TYPE_FP32 }', "state.output_name"),
        ('state { input_name: "h" output_name: "o" }', "data_type is TYPE_INVALID"),
        ('state { input_name: "h" output_name: "o" data_type: TYPE_FP32 dims: 0 }', "dims"),
        (STATE % "" + STATE % "", "state.input_name is 'h' twice"),
        (STATE % "use_growable_memory: true", "use_growable_memory"),
        (STATE % "initial_state { } initial_state { }", "given 2 times"),
        (STATE % 'initial_state { name: "n" data_type: TYPE_FP64 dims: 4 zero_data: true }', "data_type"),
        (STATE % "initial_state { data_type: TYPE_FP32 dims: 4 zero_data: true }", "name is empty"),
        (STATE % 'initial_state { name: "n" data_type: TYPE_FP32 dims: 5 zero_data: true }', "dims is"),
        (STATE % 'initial_state { name: "n" data_type: TYPE_FP32 dims: -1 zero_data: true }', "dims is"),
        (STATE % 'initial_state { name: "n" data_type: TYPE_FP32 zero_data: true }', "dims is"),
        (STATE % 'initial_state { name: "n" data_type: TYPE_FP32 dims: 4 }', "without data"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_by_name(text: str, field: str) -> None:
    with pytest.raises(ModelLoadError, match=r"sequence_batching\.") as caught:
        from_text(text)
    assert field in str(caught.value)
