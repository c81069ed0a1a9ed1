"""When requests are sent: arrival times drawn up front, from a rate over time and a seed.

A schedule is a sorted array of nanoseconds from the start of a run. It doesn't know what the server does, so
a slow answer delays no later request: that is what makes a load test an open loop.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Process = Literal["poisson", "constant"]
SECOND = 1_000_000_000
# A schedule is drawn whole before the first request is sent: 8 bytes a request here, some 60 once it is
# answered.
MOST_REQUESTS = 50_000_000
_COLUMNS = ("timestamp", "time", "arrival")


class ScheduleError(Exception):
    """A rate, a duration or a trace that makes no schedule; the message says which and why."""


@dataclass(frozen=True)
class RateProfile:
    """Requests per second over time, linear between points; two points at one time are a step.

    Attributes:
        points: (seconds, requests per second), in order of time, from 0 on.

    Raises:
        ScheduleError: a rate or a time that is none.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times, rates = zip(*self.points, strict=True)
        if not np.isfinite([*times, *rates]).all() or min(rates) < 0 or max(rates) == 0:
            raise ScheduleError(f"rates of {list(rates)} requests/s: expected numbers above 0")
        if times[0] != 0 or times[-1] <= 0 or any(after < before for before, after in pairwise(times)):
            raise ScheduleError(f"a rate at {list(times)} s: expected times from 0 on, in order")
        if self.requests > MOST_REQUESTS:
            raise ScheduleError(
                f"{self.requests:.3g} requests: at most {MOST_REQUESTS} fit into a run; lower the rate "
                "or the duration"
            )

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.points[-1][0]

    @property
    def requests(self) -> float:
        """How many requests it stands for."""
        return float(self._cumulative()[-1])

    def _cumulative(self) -> NDArray[np.float64]:
        """Expected requests up to each point."""
        times, rates = (np.array(column, np.float64) for column in zip(*self.points, strict=True))
        return np.concatenate([[0.0], np.cumsum(np.diff(times) * (rates[:-1] + rates[1:]) / 2)])

    def times_of(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """When the expected number of requests reaches each of the counts, in seconds."""
        times, rates = (np.array(column, np.float64) for column in zip(*self.points, strict=True))
        cumulative = self._cumulative()
        segment = np.clip(np.searchsorted(cumulative, counts, "right") - 1, 0, len(times) - 2)
        left = np.maximum(counts - cumulative[segment], 0.0)
        length = np.maximum(times[segment + 1] - times[segment], np.finfo(float).tiny)
        first, slope = rates[segment], (rates[segment + 1] - rates[segment]) / length
        # The root of first·t + slope·t²/2 = left, in the form that also stands when the slope is 0.
        root = np.sqrt(np.maximum(first**2 + 2 * slope * left, 0.0))
        return times[segment] + 2 * left / np.maximum(first + root, np.finfo(float).tiny)


def steady(rate: float, seconds: float) -> RateProfile:
    """The same rate all the time."""
    return RateProfile(((0.0, rate), (seconds, rate)))


def ramp(first: float, last: float, seconds: float) -> RateProfile:
    """From one rate to another, evenly."""
    return RateProfile(((0.0, first), (seconds, last)))


def steps(rates: Sequence[float], seconds: float) -> RateProfile:
    """One rate after the other, each for its share of the time."""
    each = seconds / len(rates)
    return RateProfile(tuple((each * (n + end), rate) for n, rate in enumerate(rates) for end in (0, 1)))


def bursts(rate: float, seconds: float, on: float, off: float) -> RateProfile:
    """On and off in turn, all requests while it is on; `rate` is the mean, when the last period is whole."""
    if not (on > 0 and off >= 0):
        raise ScheduleError(f"bursts of {on:g} s every {on + off:g} s: expected more than 0 s")
    points: list[tuple[float, float]] = []
    peak, start = rate * (on + off) / on, 0.0
    while start < seconds:
        for length, level in ((on, peak), (off, 0.0)):
            end = min(start + length, seconds)
            if end > start:
                points += [(start, level), (end, level)]
            start += length
    return RateProfile(tuple(points))


def arrivals(profile: RateProfile, process: Process, seed: int) -> NDArray[np.int64]:
    """Draw a schedule.

    Args:
        profile: the rate over time.
        process: `poisson`, as many clients that know nothing of each other; `constant`, evenly spaced.
        seed: of the draw; the same seed gives the same schedule.

    Returns:
        Nanoseconds from the start of the run, sorted.
    """
    expected = profile.requests
    if process == "constant":
        counts = np.arange(0.5, expected)
    else:
        # Given how many there are, the arrivals of a Poisson process lie anywhere with equal probability.
        random = np.random.default_rng(seed)
        counts = np.sort(random.uniform(0, expected, random.poisson(expected)))
    return (profile.times_of(counts) * SECOND).astype(np.int64)


def read_trace(path: Path) -> tuple[NDArray[np.int64], list[str]]:
    """Recorded arrivals: a time in seconds a line, or CSV with a column `timestamp` and, if wanted, `model`.

    The first arrival is the start of the run, so times of day in seconds do, too.

    Returns:
        Nanoseconds from the first arrival on, sorted, and each request's model; no models where there is no
        column.

    Raises:
        ScheduleError: the file can't be read, or a line has no time.
    """
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row and not row[0].startswith("#")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"trace '{path}': {error}") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    time_column = next((header.index(name) for name in _COLUMNS if name in header), None)
    model_column = header.index("model") if "model" in header else None
    if time_column is not None:
        rows = rows[1:]
    if not rows:
        raise ScheduleError(f"trace '{path}' has no arrivals: expected a time in seconds a line")
    try:
        times = np.array([float(row[time_column or 0]) for row in rows])
        models = [row[model_column].strip() for row in rows] if model_column is not None else []
    except (ValueError, IndexError) as error:
        raise ScheduleError(f"trace '{path}': expected a time in seconds in every line: {error}") from error
    if not np.isfinite(times).all():
        raise ScheduleError(f"trace '{path}': a time is not finite")
    order = np.argsort(times, kind="stable")
    offsets = np.round((times[order] - times.min()) * SECOND).astype(np.int64)
    return offsets, [models[n] for n in order] if models else []
