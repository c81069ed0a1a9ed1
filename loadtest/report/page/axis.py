"""From values to places on a plot, and which of them to label: linear, logarithmic, percentiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest.report.page.quantities import grouped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_TICKS, _SECONDS = 5, 8
# HdrHistogram's resolution is a microsecond: nothing below it is drawn.
_LOWEST_MS = 1e-3
# The largest of n values is what HdrHistogram says from log10(2 n) nines on: so far, and a little more.
BEYOND = 0.4
# More would not fit beside each other on a phone.
_MOST_NINES = 6.0
# Pixels between two labels above each other.
_APART = 16
# A tail that is so many times its median is drawn on a logarithmic axis.
_WIDE = 8.0


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks.

    Attributes:
        low, high: the values at its ends.
        ticks: values and their labels.
        transform: of a value, after which the scale is linear.
        title: what it shows, with the unit.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str
    transform: Callable[[float], float] = float

    def at(self, value: float) -> float:
        """The place of a value, from 0 at the low end to 1 at the high one; values beyond are at the end."""
        low, high = self.transform(self.low), self.transform(self.high)
        inside = min(max(value, self.low), self.high)
        return (self.transform(inside) - low) / (high - low)


def linear(high: float, title: str, parts: int = _TICKS) -> Axis:
    """From 0 to a round number that is not below `high`, in so many parts or fewer."""
    step = _round_step((high if high > 0 else 1) / parts)
    count = max(1, math.ceil(high / step - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(
        0.0, count * step, tuple((n * step, grouped(n * step, decimals)) for n in range(count + 1)), title
    )


def whole(high: float, title: str) -> Axis:
    """As `linear`, with ticks at whole numbers only, for counts."""
    axis = linear(max(high, 1.0), title)
    kept = tuple((value, grouped(value)) for value, _ in axis.ticks if value == int(value))
    return Axis(axis.low, axis.high, kept, title)


def seconds(high: float, title: str) -> Axis:
    """The time of a run: it ends where the run does, not at a round number."""
    ticks = tuple(tick for tick in linear(high, title, _SECONDS).ticks if tick[0] <= high * (1 + 1e-9))
    return Axis(0.0, high, ticks, title)


def logarithmic(low: float, high: float, title: str, height: int) -> Axis:
    """From 1, 2 or 5 times a power of ten to another, around the values, with labels as there is room."""
    low = max(low, _LOWEST_MS)
    steps = _one_two_five(low, max(high, low * 2))
    kept = steps
    if (len(steps) - 1) * _APART > height:
        # Powers of ten, and where the axis ends, if that isn't right above one.
        kept = [
            value for value in steps if _is_power(value) or (value == steps[-1] and not _is_power(value / 2))
        ]
    ticks = tuple((value, _plain(value)) for value in kept)
    return Axis(steps[0], steps[-1], ticks, title, math.log10)


def latencies(values: Iterable[float], typical: float, title: str, height: int) -> Axis:
    """For times in milliseconds: linear if the largest is not far from a typical one, else logarithmic.

    Args:
        values: that it is to hold.
        typical: the median.
        title: of the axis.
        height: of the plot in pixels.
    """
    found = [value for value in values if value > 0]
    if not found or max(found) <= _WIDE * typical:
        return linear(max(found, default=1.0), title)
    return logarithmic(min(found), max(found), title, height)


def percentiles(count: int, title: str) -> Axis:
    """HdrHistogram's axis: each nine takes as much room as the one before, up to what `count` values say.

    Its values are shares from 0 to below 1.
    """
    nines = min(_MOST_NINES, max(1.3, math.log10(max(count, 1)) + BEYOND))
    marks = [0.0, 0.5, *(1 - 0.1**n for n in range(1, math.floor(nines) + 1))]
    return Axis(
        0.0, 1 - 10**-nines, tuple((mark, f"{100 * mark:.10g}\u00a0%") for mark in marks), title,
        lambda share: -math.log10(1 - share),
    )  # fmt: skip


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _one_two_five(low: float, high: float) -> list[float]:
    """The round numbers around two values, in order."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    found = [float(f"{factor}e{exponent}") for exponent in exponents for factor in (1, 2, 5)]
    first = max(n for n, value in enumerate(found) if value <= low * (1 + 1e-9))
    last = min(n for n, value in enumerate(found) if value >= high * (1 - 1e-9))
    return found[first : last + 1]


def _is_power(value: float) -> bool:
    return math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-9)


def _plain(value: float) -> str:
    return grouped(value, max(0, -math.floor(math.log10(value) + 1e-9)))
