"""Which tokens of a prompt need not be read, as another sequence has read the same. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serve.generate.cache_slots import Prefix
    from serve.generate.sequence import Sequence

# Below this a copy isn't worth its bookkeeping, and every two texts of a language begin alike by chance.
LEAST_REUSED = 8

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Match:
    """What a prompt has in common with others.

    Attributes:
        slot: holds the longest common prefix that can be copied now; None: there is none worth it.
        tokens: its length.
        coming: a sequence that came earlier and will have read more that is common; None: there is none.
        coming_tokens: how much it will be.
    """

    slot: int | None = None
    tokens: int = 0
    coming: Sequence | None = None
    coming_tokens: int = 0


def common_length(one: list[int], other: list[int], limit: int) -> int:
    """How many of the first `limit` tokens are the same: 20 µs for 1 000."""
    limit = min(limit, len(one), len(other))
    start = 0
    while start < limit and one[start : start + _BLOCK] == other[start : start + _BLOCK]:
        start += _BLOCK
    while start < limit and one[start] == other[start]:
        start += 1
    return min(start, limit)


def find_match(sequence: Sequence, running: Iterable[Sequence], retained: Mapping[int, Prefix]) -> Match:
    """The longest prefix of a prompt that slots hold, or that sequences before it are about to read.

    The prompt's last token is never part of it: it has to be read for the logits that follow it.

    Args:
        sequence: whose prompt it is.
        running: in order of arrival; those behind `sequence` aren't waited for, so no two wait in a circle.
        retained: slots that are kept, with what they hold.
    """
    limit = sequence.prompt_length - 1
    if limit < LEAST_REUSED:
        return Match()
    slot, tokens = None, LEAST_REUSED - 1
    for kept, prefix in retained.items():
        common = common_length(sequence.ids, prefix.ids, limit)
        if common > tokens:
            slot, tokens = kept, common
    coming, coming_tokens, earlier = None, 0, True
    for other in running:
        if other is sequence:
            earlier = False
            continue
        common = common_length(sequence.ids, other.ids, limit)
        if min(common, other.cached) > tokens:
            slot, tokens = other.slot, min(common, other.cached)
        if earlier and other.cached < common > coming_tokens:
            coming, coming_tokens = other, common
    if slot is None:
        tokens = 0
    if coming is None or coming_tokens < tokens + LEAST_REUSED:
        return Match(slot, tokens)
    return Match(slot, tokens, coming, coming_tokens)
