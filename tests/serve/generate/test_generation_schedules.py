"""Random schedules of arrivals, stops, cancels, deadlines and failures, run on a cache of plain tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import CanceledError, DeadlineExceededError, InvalidArgumentError, UnavailableError
from serve.generate.settings import GenerationSettings
from tests.serve.generate.scheduled_cache import ScheduledCache, sequence

if TYPE_CHECKING:
    from serve.generate.scheduler import GenerationScheduler
    from serve.generate.sequence import Sequence
    from serve.generate.step import Step

VOCABULARY = 50
CONTEXT = 400
NEVER = -1


@dataclass(frozen=True)
class Arrival:
    """A request of a schedule; times are steps."""

    at: int
    prompt: list[int]
    max_tokens: int
    stops_after: int
    cancelled_at: int
    deadline: int


@dataclass
class Replay:
    """Runs a schedule to its end and checks every step of it."""

    cache: ScheduledCache
    arrivals: list[Arrival]
    failures: frozenset[int]
    rng: random.Random
    now: int = 0
    stops_after: dict[Sequence, int] = field(default_factory=dict)
    cancels: list[tuple[int, Sequence]] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    unanswered: set[Sequence] = field(default_factory=set)
    refused: int = 0
    work: int = 0

    @property
    def scheduler(self) -> GenerationScheduler:
        return self.cache.scheduler

    def run(self) -> None:
        due = sorted(self.arrivals, key=lambda arrival: arrival.at)
        idle = 0
        while due or self.scheduler.has_work:
            while due and due[0].at <= self.now:
                self.arrive(due.pop(0))
            for at, each in self.cancels:
                each.call.cancelled |= at <= self.now
            step = self.scheduler.next(self.now)
            self.check(step)
            idle += not step.runs
            if self.now in self.failures and step.runs:
                self.unanswered.difference_update(self.cache.fail(step))
            else:
                self.carry_out(step)
            self.now += 1
            assert self.now <= 3 * self.work + 2 * len(self.arrivals) + 60, "somebody starves"

    def arrive(self, arrival: Arrival) -> None:
        deadline = None if arrival.deadline < 0 else self.now + arrival.deadline
        each = sequence(arrival.prompt, arrival.max_tokens, deadline)
        try:
            self.scheduler.add(each, self.now)
        except InvalidArgumentError:
            assert each.longest > min(CONTEXT, self.scheduler._slots.budget)
            self.refused += 1
        except UnavailableError:
            assert len(self.waiting) >= self.cache.settings.max_queue_size
            self.refused += 1
        else:
            self.unanswered.add(each)
            self.waiting.append(each)
            self.work += each.longest
            self.stops_after[each] = arrival.stops_after
            if arrival.cancelled_at >= 0:
                self.cancels.append((self.now + arrival.cancelled_at, each))

    def check(self, step: Step) -> None:
        scheduler, limit = self.scheduler, self.cache.settings.max_num_batched_tokens
        for each, error in step.dropped:
            assert isinstance(error, (CanceledError, DeadlineExceededError))
            assert each.call.cancelled if isinstance(error, CanceledError) else each.call.expired(self.now)
            self.unanswered.remove(each)
        assert not any(each.call.cancelled or each.call.expired(self.now) for each in self.unanswered)
        self.waiting = [each for each in self.waiting if each in self.unanswered]
        admitted = [each.slot is not None for each in self.waiting]
        assert admitted == sorted(admitted, reverse=True), "one that came later overtook"
        self.waiting = [each for each in self.waiting if each.slot is None]
        assert scheduler.waiting == len(self.waiting)
        assert scheduler.running == len(self.unanswered) - len(self.waiting)
        assert 0 <= scheduler.cache_usage <= 1
        assert step.decode == sorted(step.decode, key=scheduler._running.index) or self.cache.adjacent_rows
        assert {each for each in scheduler._running if each.pending == 1} == set(step.decode)
        read = [chunk.sequence for chunk in step.prefill]
        assert len({*read, *step.decode}) == len(read) + len(step.decode)
        assert {*read, *step.decode} <= self.unanswered
        assert bool(self.unanswered) == step.runs, "there is work, but none is done"
        assert step.runs or not step.copies
        reading = any(each.pending > 1 and each not in scheduler._awaited for each in scheduler._running)
        assert reading == bool(read), "a prompt waits although nothing keeps it"
        if limit:
            assert step.tokens <= max(limit, len(step.decode) + bool(read))
        scheduler.check()

    def carry_out(self, step: Step) -> None:
        complete = [*step.decode, *(chunk.sequence for chunk in step.prefill if chunk.complete)]
        seconds = 0.002 * (bool(step.decode) + len(step.prefill)) + 0.0005 * step.tokens
        self.cache.run(step, seconds * self.rng.choice((1, 1, 1, 1.2, 20)))
        for each in complete:
            assert each.pending == 0
            each.ids.append(self.rng.randrange(VOCABULARY))
            if each.generated == min(each.max_tokens, self.stops_after[each]):
                self.scheduler.finish(each)
                self.unanswered.remove(each)
        self.cache.check()


LENGTHS = st.one_of(st.integers(0, 12), st.integers(13, 60), st.integers(100, 300))


def text(number: int, shared: int, own: int) -> list[int]:
    """A prompt that begins as others of the same number do, and goes on with tokens of its own."""
    rng = random.Random(number)  # noqa: S311 - not a secret
    prompt = [rng.randrange(VOCABULARY) for _ in range(shared)]
    return prompt + random.Random(own).choices(range(VOCABULARY), k=own)  # noqa: S311 - the same


@st.composite
def arrival(draw: st.DrawFn) -> Arrival:
    prompt = text(draw(st.integers(0, 2)), draw(LENGTHS), draw(st.integers(0, 20)))
    return Arrival(
        at=draw(st.integers(0, 40)),
        prompt=prompt or [0],
        max_tokens=draw(st.integers(1, 40)),
        stops_after=draw(st.integers(1, 40)),
        cancelled_at=draw(st.sampled_from([NEVER] * 9 + [0, 1, 3, 10, 30])),
        deadline=draw(st.sampled_from([NEVER] * 9 + [0, 2, 8, 60])),
    )


@given(
    generation=st.builds(
        GenerationSettings,
        context_length=st.just(CONTEXT),
        max_prompt_length=st.just(CONTEXT - 1),
        max_num_seqs=st.integers(1, 7),
        cache_tokens=st.sampled_from([0, 0, 100, 350, 700]),
        max_num_batched_tokens=st.sampled_from([0, 0, 0, 1, 5, 20, 64]),
        max_queue_size=st.sampled_from([0, 2, 100]),
        enable_prefix_caching=st.sampled_from([True, True, True, False]),
    ),
    adjacent_rows=st.booleans(),
    arrivals=st.lists(arrival(), max_size=14),
    failures=st.frozensets(st.integers(0, 200), max_size=2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_sequence_ends_and_every_slot_holds_what_it_should(
    *,
    generation: GenerationSettings,
    adjacent_rows: bool,
    arrivals: list[Arrival],
    failures: frozenset[int],
    seed: int,
) -> None:
    replay(ScheduledCache(generation, adjacent_rows=adjacent_rows), arrivals, failures, seed)


@pytest.mark.parametrize("adjacent_rows", [True, False])
def test_busy_schedules(*, adjacent_rows: bool) -> None:
    """Longer than those that hypothesis draws, and with more that is alike."""
    for seed in range(100):
        rng = random.Random(seed)  # noqa: S311 - not a secret
        generation = GenerationSettings(
            CONTEXT,
            CONTEXT - 1,
            max_num_seqs=rng.randint(3, 8),
            cache_tokens=rng.choice((0, 0, 1000)),
            max_num_batched_tokens=rng.choice((0, 0, 16)),
        )
        arrivals = [
            Arrival(
                at=rng.randrange(200),
                prompt=text(rng.randrange(4), rng.choice((0, 5, 30, 200)), rng.randrange(1, 30)),
                max_tokens=rng.randint(1, 60),
                stops_after=rng.randint(1, 60),
                cancelled_at=rng.choice((NEVER, NEVER, NEVER, rng.randrange(40))),
                deadline=rng.choice((NEVER, NEVER, NEVER, rng.randrange(80))),
            )
            for _ in range(40)
        ]
        failures = frozenset({rng.randrange(200)})
        replay(ScheduledCache(generation, adjacent_rows=adjacent_rows), arrivals, failures, seed)


def replay(cache: ScheduledCache, arrivals: list[Arrival], failures: frozenset[int], seed: int) -> None:
    """Run a schedule to its end; all slots are free and all memory is released then."""
    replayed = Replay(cache, arrivals, failures, random.Random(seed))  # noqa: S311 - not a secret
    replayed.run()
    scheduler, generation = cache.scheduler, cache.settings
    assert replayed.unanswered == set()
    assert scheduler.waiting == scheduler.running == 0
    assert scheduler.cache_usage == 0
    assert generation.enable_prefix_caching or scheduler._slots.retained == {}
    for slot in scheduler.forget_prefixes():
        cache.holds[slot] = None
    scheduler.check()
    assert len(scheduler._slots.free) == generation.max_num_seqs
    assert cache.holds == [None] * generation.max_num_seqs, "a slot's memory was never released"
