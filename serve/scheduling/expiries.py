"""What expires when: a heap whose items can be taken out before their time."""

from __future__ import annotations

import heapq
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

# Entries of items that are gone, 100 bytes each, that are kept beside those of the items that are there.
_KEPT_ENTRIES = 256


class Expiries(Generic[T]):
    """Items in the order in which they expire; of those that expire together, in the order of `add`."""

    def __init__(self) -> None:
        # When, and the item's number. An entry outlives its item, so it must not keep the item in memory.
        self._entries: list[tuple[float, int]] = []
        self._items: dict[int, T] = {}
        self._numbers = count(1)

    def add(self, time: float, item: T) -> int:
        """Add an item that expires at `time`; the number to `discard` it by, which is not 0."""
        number = next(self._numbers)
        self._items[number] = item
        heapq.heappush(self._entries, (time, number))
        if len(self._entries) > _KEPT_ENTRIES + 2 * len(self._items):
            self._entries = [entry for entry in self._entries if entry[1] in self._items]
            heapq.heapify(self._entries)
        return number

    def discard(self, number: int) -> None:
        """Take an item out, if it is there."""
        self._items.pop(number, None)

    def first(self) -> float | None:
        """When the next item expires; None: there is none."""
        entries = self._entries
        while entries and entries[0][1] not in self._items:
            heapq.heappop(entries)
        return entries[0][0] if entries else None

    def take_expired(self, now: float) -> list[T]:
        """Take out the items whose time is not after `now`."""
        expired = []
        while self._entries and self._entries[0][0] <= now:
            item = self._items.pop(heapq.heappop(self._entries)[1], None)
            if item is not None:
                expired.append(item)
        return expired
