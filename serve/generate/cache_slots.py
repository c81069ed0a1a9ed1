"""Who holds which slot of the cache, and how many tokens: an allocator without tensors. Pure.

A slot is live (a sequence reads or generates in it), retained (its sequence has finished, and what it read is
kept for prompts that begin alike) or free. What is retained gives way to what is live, the least recently
used first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a retained slot holds.

    Attributes:
        ids: the tokens whose keys and values they are.
        used: when it was last of use; larger is later, no two are equal.
    """

    ids: list[int]
    used: int


class CacheSlots:
    """Slots and a budget of tokens over all of them.

    Attributes:
        budget: tokens that live and retained slots may hold together.
        live: the slots that sequences run in, to the tokens reserved for each.
        retained: the slots that hold a prefix.
        free: the others.
        reserved: tokens of all live slots.
        held: tokens of all retained slots.
    """

    def __init__(self, count: int, budget: int) -> None:
        """All of `count` slots are free, and `budget` tokens."""
        self.count = count
        self.budget = budget
        self.live: dict[int, int] = {}
        self.retained: dict[int, Prefix] = {}
        self.free = set(range(count))
        self.reserved = 0
        self.held = 0
        self._uses = 0
        # Free slots whose memory nobody has been told to let go of.
        self._stale: set[int] = set()

    @property
    def has_stale(self) -> bool:
        """Whether `take_released` has any to say."""
        return bool(self._stale)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens finds a slot, what is retained put aside."""
        return len(self.live) < self.count and self.reserved + tokens <= self.budget

    def take(self, slot: int, tokens: int) -> None:
        """Make a slot live, which is free or retained; prefixes are evicted if the tokens need it."""
        if slot in self.retained:
            self.evict(slot)
        self.free.remove(slot)
        self._stale.discard(slot)
        while self.reserved + self.held + tokens > self.budget:
            self.evict(self.least_recently_used())
        self.live[slot] = tokens
        self.reserved += tokens

    def release(self, slot: int, ids: list[int]) -> None:
        """Free a live slot, or retain it as the prefix `ids` where there are any."""
        tokens = self.live.pop(slot)
        self.reserved -= tokens
        if ids:
            self._retain(slot, Prefix(ids[:tokens], self._next_use()))
        else:
            self._free(slot)

    def evict(self, slot: int) -> None:
        """Free a retained slot."""
        self.held -= len(self.retained.pop(slot).ids)
        self._free(slot)

    def move(self, source: int, target: int) -> None:
        """Move a live slot's reservation to a free slot."""
        tokens = self.live.pop(source)
        self.free.remove(target)
        self._stale.discard(target)
        self.live[target] = tokens
        self._free(source)

    def move_prefix(self, source: int, target: int, tokens: int) -> None:
        """Keep the first `tokens` of a retained slot in one that is free or retained; the source is freed."""
        prefix = self.retained[source]
        self.evict(source)
        if target in self.retained:
            self.evict(target)
        self.free.remove(target)
        self._stale.discard(target)
        self._retain(target, Prefix(prefix.ids[:tokens], prefix.used))

    def touch(self, slot: int) -> None:
        """A retained slot was of use."""
        self.retained[slot] = Prefix(self.retained[slot].ids, self._next_use())

    def least_recently_used(self) -> int:
        """The retained slot that is evicted next."""
        return min(self.retained, key=lambda slot: self.retained[slot].used)

    def take_released(self, besides: Collection[int] = ()) -> list[int]:
        """Slots whose memory is no longer needed, each said once; those `besides` are left for next time."""
        released = sorted(self._stale.difference(besides))
        self._stale.difference_update(released)
        return released

    def check(self) -> None:
        """Raise AssertionError if a slot or a token is lost or counted twice."""
        slots = sorted([*self.live, *self.retained, *self.free])
        assert slots == list(range(self.count)), f"slots {slots}, expected each of {self.count} once"
        assert self.reserved == sum(self.live.values())
        assert self.held == sum(len(prefix.ids) for prefix in self.retained.values())
        assert self.reserved + self.held <= self.budget
        assert all(prefix.ids for prefix in self.retained.values())
        assert len({prefix.used for prefix in self.retained.values()}) == len(self.retained)
        assert self._stale <= self.free

    def _retain(self, slot: int, prefix: Prefix) -> None:
        self.retained[slot] = prefix
        self.held += len(prefix.ids)

    def _free(self, slot: int) -> None:
        self.free.add(slot)
        self._stale.add(slot)

    def _next_use(self) -> int:
        self._uses += 1
        return self._uses
