"""The allocator of the cache: every slot is live, retained or free, and the tokens add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.generate.cache_slots import CacheSlots


def test_a_live_slot_reserves_its_tokens_until_it_is_released() -> None:
    slots = CacheSlots(2, 100)
    slots.take(1, 60)
    assert (slots.live, slots.free, slots.reserved) == ({1: 60}, {0}, 60)
    assert slots.fits(40)
    assert not slots.fits(41)
    slots.release(1, [])
    assert (slots.live, slots.free, slots.reserved) == ({}, {0, 1}, 0)
    slots.check()


def test_without_a_slot_nothing_fits() -> None:
    slots = CacheSlots(1, 100)
    slots.take(0, 1)
    assert not slots.fits(1)


def test_what_is_retained_counts_with_what_it_holds_and_gives_way() -> None:
    slots = CacheSlots(3, 100)
    for slot in (0, 1):
        slots.take(slot, 50)
    slots.release(0, list(range(30)))
    slots.release(1, list(range(40)))
    assert slots.held == 70
    assert slots.fits(100)
    slots.touch(0)
    slots.take(2, 40)
    assert list(slots.retained) == [0], "slot 1 is the least recently used"
    assert slots.take_released() == [1]
    slots.take(1, 60)
    assert slots.retained == {}
    slots.check()


def test_a_retained_slot_may_be_taken_itself() -> None:
    slots = CacheSlots(1, 10)
    slots.take(0, 10)
    slots.release(0, [1, 2, 3])
    slots.take(0, 8)
    assert (slots.live, slots.held) == ({0: 8}, 0)
    assert slots.take_released() == [], "its memory is in use again"


def test_a_slot_is_released_once() -> None:
    slots = CacheSlots(3, 10)
    slots.take(0, 1)
    slots.take(2, 1)
    slots.release(0, [])
    slots.release(2, [])
    assert slots.has_stale
    assert slots.take_released(besides=[0]) == [2]
    assert slots.take_released() == [0]
    assert slots.take_released() == []
    assert not slots.has_stale


def test_a_moved_prefix_keeps_its_age_and_may_lose_its_end() -> None:
    slots = CacheSlots(3, 100)
    for slot in (0, 1):
        slots.take(slot, 20)
        slots.release(slot, list(range(20)))
    slots.move_prefix(0, 2, 15)
    assert slots.retained[2].ids == list(range(15))
    assert slots.least_recently_used() == 2
    slots.move_prefix(1, 2, 20)
    assert (slots.free, slots.held) == ({0, 1}, 20)
    slots.check()


@pytest.mark.parametrize(
    "damage",
    [
        lambda slots: slots.free.add(0),
        lambda slots: slots.free.clear(),
        lambda slots: slots.live.update({0: 6}),
        lambda slots: slots.retained[1].ids.append(1),
        lambda slots: slots.retained.update({2: slots.retained[1]}),
        lambda slots: setattr(slots, "budget", 7),
        lambda slots: slots._stale.add(0),
    ],
)
def test_the_check_finds_what_is_wrong(damage: object) -> None:
    slots = CacheSlots(3, 10)
    slots.take(0, 5)
    slots.take(1, 4)
    slots.release(1, [1, 2, 3])
    slots.check()
    assert callable(damage)
    damage(slots)
    with pytest.raises(AssertionError):
        slots.check()


OPERATION = st.tuples(
    st.sampled_from(["take", "release", "retain", "evict", "move", "move_prefix", "touch", "released"]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 30),
)


@given(st.integers(1, 6), st.integers(1, 60), st.lists(OPERATION, max_size=30))
@settings(max_examples=500, deadline=None)
def test_nothing_is_lost_whatever_happens(
    count: int, budget: int, operations: list[tuple[str, int, int, int]]
) -> None:
    slots = CacheSlots(count, budget)
    in_use: set[int] = set()  # whose memory is not released
    for name, one, other, tokens in operations:
        if name == "take" and one in slots.free | slots.retained.keys() and slots.fits(tokens):
            slots.take(one, tokens)
        elif name in ("release", "retain") and one in slots.live:
            slots.release(one, list(range(tokens if name == "retain" else 0)))
        elif name in ("evict", "touch") and one in slots.retained:
            getattr(slots, name)(one)
        elif name == "move" and one in slots.live and other in slots.free:
            slots.move(one, other)
        elif name == "move_prefix" and one in slots.retained and other in slots.free:
            slots.move_prefix(one, other, min(tokens, len(slots.retained[one].ids)))
        elif name == "released":
            released = set(slots.take_released())
            assert released == in_use & slots.free
            in_use -= released
        in_use |= slots.live.keys() | slots.retained.keys()
        slots.check()
    for slot in list(slots.live):
        slots.release(slot, [])
    for slot in list(slots.retained):
        slots.evict(slot)
    slots.check()
    assert (len(slots.free), slots.reserved, slots.held) == (count, 0, 0)
