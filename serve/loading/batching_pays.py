"""How many rows in one run make a row cheaper, measured on the graph as it is loaded.

On a CPU a batch pays 8 times for a graph of one small node, 2.1 times for an LSTM, and nothing for MobileNet,
BERT or ResNet, whose rows fill the cores by themselves: there it only has everybody wait for the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    TimeRun = Callable[[int], tuple[float, float]]
    """Runs so many rows together; the seconds that passed, and those that it cost, which others' work on the
    same machine adds nothing to where that can be told."""

BUDGET_SECONDS = 0.1
# A batch is worth waiting for if a row of it costs this much less than one of the largest that was.
GAIN = 0.10
# On the evidence of a single run each, on a machine that does other things too, it has to be plain.
PLAIN_GAIN = 0.25
# What a run costs beside the graph: taking it out of the queue, splitting its answer, waking who waits.
FIXED_SECONDS = 12e-6

_FLAT = 0.03  # no gain at all
_SLOW_SECONDS = 1e-3  # a run that dwarfs all fixed costs
_ROUNDS = 15
_FEW_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found.

    Attributes:
        useful: the largest batch that pays; 1: none does.
        figures: rows of a run to seconds a row, fixed costs included.
    """

    useful: int
    figures: Mapping[int, float]


def measure(time_run: TimeRun, largest: int, budget: float = BUDGET_SECONDS) -> Measured:
    """Compare runs of one row, 2, 4, 8, ... rows with each other, one after the other and in turns.

    Larger batches are tried as long as they may pay: every size that is tried has onnxruntime keep memory for
    it. The comparison that decides is made twice, and nothing is decided on what noise can bring about.

    Args:
        time_run: runs the graph.
        largest: rows that a run may have, at least 1.
        budget: seconds in all; the first comparison is made beyond it where a run takes less than it.
    """
    trials = _Trials(time_run, budget)
    first = trials.run(1)  # the first run makes room for its tensors
    figures = {1: min(first, trials.run(1)) if first < budget / 5 else first}
    useful = 1
    misses = 0
    sizes = list(_sizes(largest))
    for index, rows in enumerate(sizes):
        share = trials.left / (2 * (len(sizes) - index))
        if not trials.affords(rows, figures[useful]):
            break
        before, now, rounds = trials.compare(useful, rows, share)
        if _pays(before, now, rounds) and trials.left > 0:
            before, now, rounds = trials.compare(useful, rows, share)
        figures[useful], figures[rows] = before, now
        useful, misses = (rows, 0) if _pays(before, now, rounds) else (useful, misses + 1)
        is_flat = now > (1 - _FLAT) * before and before > _SLOW_SECONDS
        if is_flat or misses > 1:
            break
    return Measured(useful, figures)


def _pays(before: float, now: float, rounds: int) -> bool:
    return now <= (1 - (GAIN if rounds >= _FEW_ROUNDS else PLAIN_GAIN)) * before


def _sizes(largest: int) -> Iterator[int]:
    """2, 4, 8, ... and the largest."""
    rows = 2
    while rows < largest:
        yield rows
        rows *= 2
    if largest > 1:
        yield largest


@dataclass(slots=True)
class _Trials:
    """Runs within a budget."""

    time_run: TimeRun
    budget: float
    left: float = field(init=False)
    _seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start with all of the budget."""
        self.left = self.budget

    def run(self, rows: int) -> float:
        """Seconds a row of one run."""
        self._seen.add(rows)
        passed, cost = self.time_run(rows)
        self.left -= passed
        return (cost + FIXED_SECONDS) / rows

    def affords(self, rows: int, per_row: float) -> bool:
        """Whether there is time to try so many rows; a pair is tried of every graph that isn't too slow."""
        if len(self._seen) == 1:
            return per_row < self.budget
        return rows * per_row < self.left

    def compare(self, smaller: int, larger: int, share: float) -> tuple[float, float, int]:
        """Seconds a row, of runs in turns for about `share` seconds, and how many turns there were."""
        end = self.left - share
        before: list[float] = []
        now: list[float] = []
        if larger not in self._seen:
            first = self.run(larger)  # it makes room for its tensors, and is left out if there is time to
            if self.left < first * larger:
                now.append(first)
                before.append(self.run(smaller))
        while not now or (len(now) < _ROUNDS and self.left > (end if len(now) >= _FEW_ROUNDS else 0)):
            before.append(self.run(smaller))
            now.append(self.run(larger))
        return _typical(before), _typical(now), len(now)


def _typical(seconds: list[float]) -> float:
    """The lower quartile: what else the machine does only ever adds to a run."""
    return sorted(seconds)[len(seconds) // 4]
