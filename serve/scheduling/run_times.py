"""How long recent runs took, and what that says about the next one."""

from __future__ import annotations

import math
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

_KEPT_RUNS = 32
_ENOUGH_RUNS = 4
_FRESH_SECONDS = 1.0


class RunTimes:
    """How long recent runs took: the least that a run to come will take.

    An estimate too high would drop requests that can be met, and while it drops everything nothing corrects
    it. So it is the shortest of the last runs of the same shape and of no more rows, never of a few; and when
    no run has ended for a second nothing is known any more: the next request is tried.

    Attributes:
        slowest: the longest of the last runs, seconds; 0: none.
    """

    def __init__(self) -> None:
        self.slowest = 0.0
        self._runs: deque[tuple[float, int, Hashable]] = deque(maxlen=_KEPT_RUNS)
        self._last = -math.inf

    def add(self, shape: Hashable, rows: int, started: float, ended: float) -> None:
        """Take a run into account; times in seconds."""
        runs, seconds = self._runs, ended - started
        leaves = runs[0][0] if len(runs) == _KEPT_RUNS else -1.0
        runs.append((seconds, rows, shape))
        self._last = ended
        if seconds >= self.slowest:
            self.slowest = seconds
        elif leaves >= self.slowest:
            self.slowest = max(runs, key=itemgetter(0))[0]

    def least(self, shape: Hashable, rows: int, now: float) -> float:
        """What a run of so many rows takes at least, seconds; 0: unknown."""
        if now - self._last > _FRESH_SECONDS:
            return 0.0
        known = [
            seconds for seconds, of_rows, of_shape in self._runs if of_rows <= rows and of_shape == shape
        ]
        return min(known) if len(known) >= _ENOUGH_RUNS else 0.0
