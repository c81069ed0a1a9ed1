"""Which slot a sequence gets: decode rows are to be neighbours, with nothing retained among them. Pure.

A graph that keeps its cache in place runs on neighbouring slots [lo, hi) of one buffer. A slot in between
that has no row costs as much as one that has, and some position of it is written to.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from serve.generate.prefix_reuse import LEAST_REUSED
from serve.generate.step import Copy

if TYPE_CHECKING:
    from serve.generate.cache_slots import CacheSlots
    from serve.generate.sequence import Sequence
    from serve.generate.step import Step

# Tokens that a step may copy, but for one copy that may be longer: about as long as a chunk takes (74 KB a
# token in a cache of 12 layers of 768).
_COPIED_TOKENS = 256
# An idle row costs a step as much as copying about 30 tokens; half of that, as a row may stop at any time.
_TOKENS_PER_IDLE_ROW = 15


def room_to_copy(step: Step) -> int:
    """Tokens that a step may copy beside those that it copies already."""
    return _COPIED_TOKENS - sum(copy.tokens for copy in step.copies)


class SlotPlacement:
    """Places sequences in slots. Where rows needn't be neighbours, slots are just names and nothing moves."""

    def __init__(self, slots: CacheSlots, *, adjacent_rows: bool) -> None:
        self._slots = slots
        self._adjacent = adjacent_rows

    def place(self, step: Step, tokens: int, source: int | None, *, take_over: bool) -> int:
        """Make a slot live for a sequence of so many tokens that fits.

        The nearest to the live ones: a hole among them or, where there is none, a neighbour. Of several the
        source if it may be taken over, else a free one, else the least recently used prefix gives way.

        Args:
            step: gets a copy if a prefix is moved out of the way.
            tokens: to reserve.
            source: holds the beginning of the sequence's prompt; None: nobody does.
            take_over: whether the source's own slot is wanted; it may be chosen anyway.
        """
        slots = self._slots
        if source in slots.retained:
            slots.touch(source)  # the latest: no other takes its place
        lo, hi = min(slots.live, default=slots.count), max(slots.live, default=-1)

        def cost(slot: int) -> tuple[int, bool, bool, int, int]:
            span = max(hi, slot) - min(lo, slot) if self._adjacent else 0
            prefix = slots.retained.get(slot)
            wanted = take_over and slot == source
            return span, not wanted, prefix is not None, prefix.used if prefix else 0, slot

        chosen = min((*slots.free, *slots.retained), key=cost)
        if chosen in slots.retained and chosen != source:
            self._clear(step, chosen)
        slots.take(chosen, tokens)
        return chosen

    def order_rows(self, step: Step, *, move: bool) -> None:
        """Sort the decode rows by slot, free the slots in between of prefixes, and move a row if it pays.

        Args:
            step: whose decode rows they are; gets the copies.
            move: whether a row at an end may move into a hole, as nobody comes who would fill it.
        """
        rows = step.decode
        if not self._adjacent or not rows:
            return
        rows.sort(key=attrgetter("place"))
        lo, hi = rows[0].place, rows[-1].place
        if hi - lo + 1 == len(rows):
            return
        for slot in [slot for slot in self._slots.retained if lo < slot < hi]:
            self._clear(step, slot)
        holes = sorted(slot for slot in self._slots.free if lo < slot < hi)
        if holes and move:
            self._move_row(step, holes)
            rows.sort(key=attrgetter("place"))

    def _move_row(self, step: Step, holes: list[int]) -> None:
        """Move the first or the last row into a hole, whichever makes more rows neighbours."""
        rows = step.decode

        def after(choice: tuple[Sequence, int]) -> tuple[int, int, int]:
            row, hole = choice
            rest = rows[1:] if row is rows[0] else rows[:-1]
            return max(rest[-1].place, hole) - min(rest[0].place, hole), row.cached, -row.place

        row, hole = best = min(((row, hole) for row in (rows[0], rows[-1]) for hole in holes), key=after)
        narrower = rows[-1].place - rows[0].place - after(best)[0]
        worth = narrower * (row.longest - row.cached) * _TOKENS_PER_IDLE_ROW
        if row.cached > worth or (step.copies and row.cached > room_to_copy(step)):
            return
        source, row.slot = row.place, hole
        if row.cached:  # a prompt of one token has nothing yet
            step.copies.append(Copy(source, hole, row.cached))
        self._slots.move(source, hole)

    def _clear(self, step: Step, slot: int) -> None:
        """Free a retained slot; move the prefix as far from the live slots as there is place, or evict it.

        Its place may be that of a prefix of less recent use. What is too long to be copied in this step loses
        its end.
        """
        slots = self._slots
        prefix, room = slots.retained[slot], room_to_copy(step)
        lo, hi = min((slot, *slots.live)), max((slot, *slots.live))
        places = [
            (place in slots.free, max(lo - place, place - hi), place)
            for place in (*slots.free, *slots.retained)
            if not lo <= place <= hi
            if place in slots.free or slots.retained[place].used < prefix.used
        ]
        if room < LEAST_REUSED or not places:
            slots.evict(slot)
            return
        _, _, target = max(places)
        tokens = min(len(prefix.ids), room)
        step.copies.append(Copy(slot, target, tokens))
        slots.move_prefix(slot, target, tokens)
