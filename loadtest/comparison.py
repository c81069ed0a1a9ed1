"""Two runs side by side: by how much a figure has changed, and whether that is more than chance.

Latencies that follow each other are alike (a slow second slows all of its requests), so drawing single
requests would make intervals far too narrow. Slices of the run are drawn instead, with all of their requests:
a block bootstrap. Künsch, "The jackknife and the bootstrap for general stationary observations", 1989.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from loadtest.result import RunResult

DRAWS = 2000
CONFIDENCE = 0.95
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
THROUGHPUT = "throughput"


@dataclass(frozen=True)
class Change:
    """A figure before and after.

    Attributes:
        metric: its name.
        before, after: milliseconds, or per second.
        change: relative, 0.1 is 10 % more.
        low, high: 95 % interval of the change.
        more_is_worse: as of latencies; of rates, less is.
    """

    metric: str
    before: float
    after: float
    change: float
    low: float
    high: float
    more_is_worse: bool = True

    @property
    def verdict(self) -> str:
        """`worse`, `better`, or `no difference`: the interval has 0 in it."""
        if self.low <= 0 <= self.high:
            return "no difference"
        return "worse" if (self.change > 0) == self.more_is_worse else "better"


def compare(before: RunResult, after: RunResult, draws: int = DRAWS, seed: int = 0) -> list[Change]:
    """The changes of percentiles, mean and throughput; none of a run without answers."""
    if not (before.total.answered and after.total.answered):
        return []
    random = np.random.default_rng(seed)
    first, second = _Blocks(before), _Blocks(after)
    picks = [first.draw(random, draws), second.draw(random, draws)]
    figures: dict[str, Callable[[_Blocks, NDArray[np.float64]], NDArray[np.float64]]] = {
        **{f"p{p:g}": partial(_Blocks.percentile, percent=p) for p in PERCENTILES},
        "mean": _Blocks.mean,
        THROUGHPUT: _Blocks.rate,
    }
    return [_change(metric, (first, second), picks, figure) for metric, figure in figures.items()]


class _Blocks:
    """The slices of a run as a table: how many of a slice's answers took how long."""

    def __init__(self, result: RunResult) -> None:
        parts = [part for part in result.slices if part.seconds > 0]
        found = [part.latency.counts() for part in parts]
        self.values = np.unique(np.concatenate([values for values, _ in found]))
        self.table = np.zeros((len(parts), len(self.values)))
        for row, (values, counts) in enumerate(found):
            self.table[row, np.searchsorted(self.values, values)] = counts
        self.seconds = np.array([part.seconds for part in parts])
        self.whole = np.ones((1, len(parts)))

    def draw(self, random: np.random.Generator, draws: int) -> NDArray[np.float64]:
        """How often each slice is in each draw."""
        count = len(self.table)
        return random.multinomial(count, np.full(count, 1 / count), draws).astype(np.float64)

    def percentile(self, weights: NDArray[np.float64], percent: float) -> NDArray[np.float64]:
        cumulative = np.cumsum(weights @ self.table, axis=1)
        wanted = np.maximum(np.floor(cumulative[:, -1:] * percent / 100 + 0.5), 1)  # as Histogram counts
        return np.asarray(self.values[np.minimum((cumulative < wanted).sum(axis=1), len(self.values) - 1)])

    def mean(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = weights @ self.table
        return np.asarray((counts @ self.values) / np.maximum(counts.sum(axis=1), 1))

    def rate(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((weights @ self.table).sum(axis=1) / (weights @ self.seconds))


def _change(
    metric: str,
    runs: tuple[_Blocks, _Blocks],
    picks: list[NDArray[np.float64]],
    figure: Callable[[_Blocks, NDArray[np.float64]], NDArray[np.float64]],
) -> Change:
    before, after = (float(figure(blocks, blocks.whole)[0]) for blocks in runs)
    drawn = [figure(blocks, weights) for blocks, weights in zip(runs, picks, strict=True)]
    ratios = drawn[1] / np.maximum(drawn[0], 1e-9) - 1
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Change(metric, before, after, after / before - 1, float(low), float(high), metric != THROUGHPUT)
