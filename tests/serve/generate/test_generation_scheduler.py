"""Which sequences run in a step and what they read, one rule at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serve.errors import CanceledError, DeadlineExceededError, InvalidArgumentError, UnavailableError
from serve.generate.settings import GenerationSettings
from serve.generate.step import Copy, Step
from tests.serve.generate.scheduled_cache import ScheduledCache, sequence

if TYPE_CHECKING:
    from serve.generate.sequence import Sequence

TEXT = list(range(1000, 2000))


def cache(
    *,
    slots: int = 4,
    adjacent_rows: bool = False,
    cache_tokens: int = 0,
    max_num_batched_tokens: int = 0,
    max_queue_size: int = 128,
) -> ScheduledCache:
    generation = GenerationSettings(
        context_length=2048,
        max_prompt_length=2000,
        max_num_seqs=slots,
        cache_tokens=cache_tokens,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue_size=max_queue_size,
    )
    return ScheduledCache(generation, adjacent_rows=adjacent_rows)


def step(cached: ScheduledCache, now: float = 0) -> Step:
    """One step; whoever gets a token gets token 7, and ends after `max_tokens`."""
    scheduler = cached.scheduler
    done = scheduler.next(now)
    complete = [*done.decode, *(chunk.sequence for chunk in done.prefill if chunk.complete)]
    cached.run(done)
    for each in complete:
        each.ids.append(7)
        if each.generated == each.max_tokens:
            scheduler.finish(each)
    cached.check()
    return done


def add(cached: ScheduledCache, *sequences: Sequence) -> tuple[Sequence, ...]:
    for each in sequences:
        cached.scheduler.add(each, 0)
    return sequences


def streams(cached: ScheduledCache, count: int, tokens: int = 1000) -> list[Sequence]:
    """Sequences that generate, and do nothing else."""
    added = add(cached, *(sequence([number], tokens) for number in range(count)))
    step(cached)
    return list(added)


def read(done: Step) -> list[tuple[Sequence, int]]:
    return [(chunk.sequence, chunk.count) for chunk in done.prefill]


def test_a_sequence_runs_from_its_prompt_to_its_last_token() -> None:
    cached = cache(max_num_batched_tokens=6)
    (only,) = add(cached, sequence(TEXT[:10], 3))
    scheduler = cached.scheduler
    assert (scheduler.waiting, scheduler.running) == (1, 0)
    assert read(step(cached)) == [(only, 6)]
    assert (scheduler.waiting, scheduler.running, scheduler.cache_usage) == (0, 1, 12 / (4 * 2048))
    assert read(step(cached)) == [(only, 4)]
    assert step(cached).decode == [only]
    assert step(cached).decode == [only]
    assert only.ids == [*TEXT[:10], 7, 7, 7]
    assert (only.slot, scheduler.running, scheduler.cache_usage) == (None, 0, 0)
    assert not scheduler.has_work


def test_a_prompt_of_one_token_is_a_decode_row() -> None:
    cached = cache()
    (only,) = add(cached, sequence([5], 2))
    assert step(cached).decode == [only]


def test_too_long_for_the_context_or_the_cache() -> None:
    with pytest.raises(InvalidArgumentError, match=r"take 2049 tokens .* at most 2048 .*lower max_tokens"):
        cache().scheduler.add(sequence(TEXT, 1050), 0)
    with pytest.raises(InvalidArgumentError, match=r"take 101 .* at most 100 \(context_length 2048, 100 tok"):
        cache(cache_tokens=100).scheduler.add(sequence(TEXT[:100], 2), 0)
    add(cache(cache_tokens=100), sequence(TEXT[:100], 1))


def test_the_queue_is_bounded_beyond_the_free_slots() -> None:
    cached = cache(slots=2, max_queue_size=3)
    add(cached, *(sequence([1], 50) for _ in range(5)))
    with pytest.raises(UnavailableError, match=r"queue size, 5 sequences wait .*max_queue_size 3"):
        add(cached, sequence([1]))
    step(cached)
    assert (cached.scheduler.waiting, cached.scheduler.running) == (3, 2)
    with pytest.raises(UnavailableError, match="queue size, 3 sequences wait"):
        add(cached, sequence([1]))


def test_the_dead_make_room_in_a_full_queue() -> None:
    cached = cache(slots=1, max_queue_size=1)
    streams(cached, 1)
    (late,) = add(cached, sequence([1], deadline=5))
    with pytest.raises(UnavailableError):
        cached.scheduler.add(sequence([1]), 4)
    cached.scheduler.add(sequence([1]), 5)
    ((dropped, error),) = step(cached, 5).dropped
    assert dropped is late
    assert isinstance(error, DeadlineExceededError)


def test_a_refusal_leaves_a_step_under_way_as_it_is() -> None:
    cached = cache(slots=2, max_queue_size=0)
    running = add(cached, sequence([1, 2, 3]), sequence([1, 2, 4]))
    under_way = cached.scheduler.next(0)
    running[0].call.cancel()
    with pytest.raises(UnavailableError):
        cached.scheduler.add(sequence([1]), 0)
    assert all(chunk.sequence.slot is not None for chunk in under_way.prefill)
    assert [dropped for dropped, _ in cached.scheduler.next(0).dropped] == [running[0]]


def test_the_slots_of_the_dead_are_free_in_the_same_step() -> None:
    cached = cache(slots=2)
    cancelled, late = add(cached, sequence([1], 50), sequence([2], 50, deadline=9))
    heirs = add(cached, sequence([3], 50), sequence([4], 50), sequence([5], 50))
    step(cached)
    cancelled.call.cancelled = True
    heirs[2].call.cancelled = True
    done = step(cached, 9)
    assert [(each, type(error)) for each, error in done.dropped] == [
        (heirs[2], CanceledError),
        (cancelled, CanceledError),
        (late, DeadlineExceededError),
    ]
    assert [str(error) for _, error in done.dropped] == [
        "the request was cancelled while it waited",
        "the request was cancelled while it ran, after 1 tokens",
        "the request's deadline passed while it ran, after 1 tokens",
    ]
    assert done.decode == list(heirs[:2])
    assert cancelled.slot is late.slot is None


def test_whoever_waits_may_be_finished() -> None:
    cached = cache(slots=1)
    (waits,) = add(cached, sequence([1]))
    cached.scheduler.finish(waits)
    cached.scheduler.finish(waits)
    assert not cached.scheduler.has_work


def test_a_big_sequence_is_not_overtaken() -> None:
    cached = cache(cache_tokens=100)
    small, big, tiny = add(cached, sequence([1], 40), sequence([2], 80), sequence([3], 2))
    step(cached)
    assert [each.slot is None for each in (small, big, tiny)] == [False, True, True]
    cached.scheduler.finish(small)
    step(cached)
    assert big.slot is not None


@pytest.mark.parametrize("streaming", [0, 1, 8])
def test_a_short_prompt_does_not_wait_for_a_long_one(streaming: int) -> None:
    cached = cache(slots=16)
    streams(cached, streaming)
    long, short = add(cached, sequence(TEXT), sequence([3] * 16))
    steps = 0
    while not short.generated:
        step(cached)
        steps += 1
    assert steps <= 3
    assert long.generated == 0


def test_a_long_prompt_is_read_although_short_ones_keep_coming() -> None:
    cached = cache(slots=8, max_num_batched_tokens=10)
    (long,) = add(cached, sequence(TEXT[:200]))
    taken = 0
    while long.generated == 0:
        add(cached, sequence([taken] * 10))
        step(cached)
        taken += 1
    assert taken <= 4 * 200 / 10 + 8


def test_equal_prompts_are_read_one_after_the_other() -> None:
    cached = cache(max_num_batched_tokens=16)
    first, second = add(cached, sequence([3] * 48, 20), sequence([4] * 48, 20))
    assert [read(step(cached))[0][0] for _ in range(3)] == [first] * 3
    assert read(step(cached)) == [(second, 15)], "the first one streams"


def test_tiny_prompts_share_a_step() -> None:
    cached = cache(max_num_batched_tokens=32)
    tiny = add(cached, *(sequence([number] * 5) for number in range(4)))
    assert read(step(cached)) == [(each, 5) for each in tiny]


def test_something_is_read_however_many_stream() -> None:
    cached = cache(slots=8, max_num_batched_tokens=4)
    streams(cached, 7)
    (reads,) = add(cached, sequence(TEXT[:3]))
    assert read(step(cached)) == [(reads, 1)]


@pytest.mark.parametrize("adjacent_rows", [True, False])
def test_identical_prompts_share_one_prefill(*, adjacent_rows: bool) -> None:
    cached = cache(slots=16, adjacent_rows=adjacent_rows)
    prompts = add(cached, *(sequence(TEXT[:100], 30) for _ in range(16)))
    done = [step(cached) for _ in range(12)]
    assert sum(chunk.count for each in done for chunk in each.prefill) <= 100
    assert all(each.reused == 99 for each in prompts[1:])
    assert set(done[-1].decode) == set(prompts)
    copied = [sum(copy.tokens for copy in each.copies) for each in done]
    assert max(copied) <= 256, "copying stalls those who stream, too"


def test_a_prefix_is_copied_when_it_is_read_not_when_its_prompt_is() -> None:
    cached = cache(max_num_batched_tokens=16)
    add(cached, sequence([*TEXT[:20], *[1] * 100]), sequence([*TEXT[:20], *[2] * 10]))
    done = [step(cached) for _ in range(3)]
    assert [each.copies for each in done] == [[], [], [Copy(0, 1, 20)]]


def test_who_waits_for_a_prefix_lends_its_urgency() -> None:
    cached = cache(max_num_batched_tokens=16)
    long, middle, short = add(
        cached, sequence([*TEXT[:32], *[1] * 500]), sequence([2] * 100), sequence([*TEXT[:32], 3])
    )
    assert [read(step(cached))[0][0] for _ in range(2)] == [long, long]
    assert step(cached).decode == [short]
    assert middle.cached > 0


def test_if_the_one_that_reads_is_cancelled_the_next_one_reads() -> None:
    cached = cache(max_num_batched_tokens=16)
    first, second, third = add(cached, *(sequence(TEXT[:100]) for _ in range(3)))
    step(cached)
    first.call.cancelled = True
    done = step(cached)
    assert done.copies == [Copy(0, 1, 16)], "what it had read is kept"
    assert read(done) == [(second, 16)]
    while not second.generated:
        assert third.cached == 0
        step(cached)
    assert step(cached).decode == [third]


def test_a_retained_slot_is_taken_over() -> None:
    cached = cache()
    add(cached, sequence(TEXT[:100]))
    step(cached)
    (again,) = add(cached, sequence([*TEXT[:80], 1, 2]))
    done = step(cached)
    assert (done.copies, done.released) == ([], [])
    assert read(done) == [(again, 2)]
    assert again.reused == 80


def test_a_long_prefix_is_not_given_up_for_a_little_of_it() -> None:
    cached = cache()
    add(cached, sequence(TEXT[:100]))
    step(cached)
    (little,) = add(cached, sequence([*TEXT[:20], 1], 5))
    assert step(cached).copies == [Copy(0, 1, 20)]
    (much,) = add(cached, sequence(TEXT[:101], 5))
    step(cached)
    assert (little.reused, much.reused) == (20, 100)


def test_what_another_prefix_begins_with_is_not_kept_twice() -> None:
    cached = cache()
    for length in (50, 100, 40):
        add(cached, sequence([*TEXT[:length]]))
        step(cached)
    assert [len(prefix.ids) for prefix in cached.scheduler._slots.retained.values()] == [100]


def test_what_goes_on_replaces_its_beginning() -> None:
    cached = cache()
    short, long = add(cached, sequence(TEXT[:50]), sequence(TEXT[:100], 3))
    while not short.generated:
        step(cached)
    assert long.slot is not None
    while long.slot is not None:
        step(cached)
    assert [len(prefix.ids) for prefix in cached.scheduler._slots.retained.values()] == [102]


def test_the_least_recently_used_prefix_gives_way() -> None:
    cached = cache(slots=2)
    for text in ([1] * 20, [2] * 20, [1] * 25, [3] * 20):
        add(cached, sequence(text))
        step(cached)
    assert sorted(prefix.ids[0] for prefix in cached.scheduler._slots.retained.values()) == [1, 3]


def test_nothing_is_kept_where_prefix_caching_is_off() -> None:
    cached = ScheduledCache(GenerationSettings(200, 100, enable_prefix_caching=False), adjacent_rows=False)
    first, second = add(cached, sequence(TEXT[:50]), sequence(TEXT[:50]))
    assert read(step(cached)) == [(first, 50), (second, 50)]
    assert cached.scheduler.has_work, "the slots are to be released"
    assert step(cached).released == [0, 1]
    assert not cached.scheduler.has_work


def test_forgotten_prefixes_release_their_slots() -> None:
    cached = cache()
    add(cached, sequence(TEXT[:50]), sequence([1] * 50))
    step(cached)
    assert cached.scheduler.forget_prefixes() == [0, 1]
    (again,) = add(cached, sequence(TEXT[:50]))
    assert read(step(cached)) == [(again, 50)]


def test_after_a_failed_step_what_was_to_be_copied_is_read() -> None:
    cached = cache(max_num_batched_tokens=8)
    (streaming,) = add(cached, sequence(TEXT[:60], 100))
    while not streaming.generated:
        step(cached)
    shares, reads = add(cached, sequence([*TEXT[:60], *[1] * 30]), sequence([2] * 6))
    failed = cached.scheduler.next(0)
    assert failed.copies == [Copy(0, 1, 60)]
    assert cached.fail(failed) == [streaming, reads]
    assert shares.cached == shares.reused == 0
    assert read(step(cached)) == [(shares, 8)]


def test_new_sequences_are_neighbours_of_those_that_run() -> None:
    cached = cache(slots=8, adjacent_rows=True)
    for number in range(3):
        add(cached, sequence([number] * 20))
        step(cached)
    assert sorted(cached.scheduler._slots.retained) == [0, 1, 2]
    rows = add(cached, *(sequence([5], 50) for _ in range(3)))
    step(cached)
    assert [each.slot for each in rows] == [3, 4, 5]


def test_a_distant_prefix_is_copied_beside_the_rows() -> None:
    cached = cache(slots=8, adjacent_rows=True)
    prefix, *rows = add(cached, sequence([9] * 20), *(sequence([number], 50) for number in range(3)))
    while not prefix.generated:
        step(cached)
    cached.scheduler.finish(rows[0])
    assert list(cached.scheduler._slots.retained) == [0]
    assert [each.slot for each in rows[1:]] == [2, 3]
    (again,) = add(cached, sequence([9] * 25, 50))
    assert step(cached).copies == [Copy(0, 1, 20)]
    assert again.slot == 1


def test_the_last_row_moves_into_a_hole() -> None:
    cached = cache(slots=8, adjacent_rows=True)
    rows = streams(cached, 4)
    step(cached)
    cached.scheduler.finish(rows.pop(1))
    done = step(cached)
    assert done.copies == [Copy(3, 1, 2)]
    assert done.decode == [rows[0], rows[2], rows[1]]
    assert [each.slot for each in done.decode] == [0, 1, 2]
    assert step(cached).released == [3]


def test_the_first_row_moves_if_that_closes_more_holes() -> None:
    cached = cache(slots=8, adjacent_rows=True)
    rows = streams(cached, 5)
    step(cached)
    for each in rows[1:3]:
        cached.scheduler.finish(each)
    assert step(cached).copies == [Copy(0, 2, 2)]
    assert [each.slot for each in step(cached).decode] == [2, 3, 4]


@pytest.mark.parametrize(("tokens", "moves"), [(14, 0), (40, 1)])
def test_a_row_that_ends_soon_does_not_move(tokens: int, moves: int) -> None:
    cached = cache(slots=8, adjacent_rows=True, max_num_batched_tokens=1000)
    rows = add(cached, *(sequence([number] * 250, tokens) for number in range(3)))
    step(cached)
    step(cached)
    cached.scheduler.finish(rows[1])
    cached.scheduler.forget_prefixes()
    assert len(step(cached).copies) == moves


@pytest.mark.parametrize(("length", "kept"), [(150, 151), (300, 256)])
def test_a_step_copies_little(length: int, kept: int) -> None:
    cached = cache(slots=8, adjacent_rows=True, max_num_batched_tokens=1000)
    rows = add(cached, *(sequence([number] * length, 500) for number in range(3)))
    step(cached)
    step(cached)
    cached.scheduler.finish(rows[1])
    assert step(cached).copies == [Copy(1, 7, kept)]
    assert len(cached.scheduler._slots.retained[7].ids) == kept
    assert step(cached).copies == [Copy(2, 1, length + 2)], "the row moves in the next step"


def test_nobody_moves_into_a_hole_that_somebody_waits_for() -> None:
    cached = cache(slots=3, adjacent_rows=True, cache_tokens=300)
    rows = add(cached, *(sequence([number], 100) for number in range(3)))
    step(cached)
    add(cached, sequence([5], 150))
    cached.scheduler.finish(rows[1])
    assert step(cached).copies == []


def test_one_move_a_step_and_no_prefix_among_the_rows() -> None:
    cached = cache(slots=16, adjacent_rows=True)
    rows = add(cached, *(sequence([number] * 20, 500) for number in range(8)))
    while any(each.generated < 5 for each in rows):
        step(cached)
    for each in rows[1:7:2]:
        cached.scheduler.finish(each)
    for _ in range(10):
        done = step(cached)
        slots = [each.slot or 0 for each in done.decode]
        assert sum(copy.tokens for copy in done.copies) <= 256
        assert not any(slots[0] < slot < slots[-1] for slot in cached.scheduler._slots.retained)
    assert slots[-1] - slots[0] + 1 == len(slots) == 5
    assert len(cached.scheduler._slots.retained) == 3, "prefixes were moved out of the way, not lost"


def test_a_prefix_in_the_way_of_a_new_sequence_is_moved() -> None:
    cached = cache(slots=8, adjacent_rows=True)
    _, ends, _ = add(
        cached, *(sequence([number] * 20, tokens) for number, tokens in enumerate((400, 9, 400)))
    )
    while not ends.generated or ends.slot is not None:
        step(cached)
    assert list(cached.scheduler._slots.retained) == [1]
    (new,) = add(cached, sequence([5] * 20))
    assert step(cached).copies == [Copy(1, 7, 28)]
    assert new.slot == 1
    assert list(cached.scheduler._slots.retained) == [7]


def test_a_later_prefix_takes_the_place_of_an_earlier_one() -> None:
    cached = cache(slots=4, adjacent_rows=True)
    first, second, third, fourth = add(
        cached, *(sequence([number] * 20, tokens) for number, tokens in enumerate((400, 9, 400, 1)))
    )
    while not second.generated or second.slot is not None:
        step(cached)
    assert fourth.generated == 1
    assert (first.slot, third.slot) == (0, 2)
    assert sorted(cached.scheduler._slots.retained) == [1, 3]
    assert step(cached).copies == [Copy(1, 3, 28), Copy(2, 1, third.cached - 1)]
    assert cached.scheduler._slots.retained[3].ids[0] == 1


def test_the_check_finds_a_sequence_without_its_slot() -> None:
    cached = cache()
    (only,) = streams(cached, 1)
    only.slot = 3
    with pytest.raises(AssertionError):
        cached.scheduler.check()
