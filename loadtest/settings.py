"""What a run is asked for, checked at the edge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.conditions import Condition

Scenario = Literal[
    "server", "closed", "single-stream", "multi-stream", "offline", "soak", "overload", "reload"
]
Arrivals = Literal["poisson", "constant", "burst"]
OPEN_LOOPS = ("server", "soak", "overload", "reload")
MOST_USERS, MOST_PROCESSES = 4096, 64


class SettingsError(Exception):
    """A setting that makes no run; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class LoadSettings:
    """One run's load.

    Attributes:
        scenario: its kind.
        rates: requests per second; several: one after the other, each for its share of the time.
        ramp: go evenly from the first of two rates to the second.
        arrivals: how the requests of an open loop lie in time.
        burst_on, burst_off: seconds of arrivals in bursts.
        trace: a file of recorded arrivals, in place of rates.
        duration: seconds.
        warmup: seconds of the same load before, which don't count.
        seed: of the schedule, the mix and the tensors.
        users: of a closed loop.
        samples_per_query: requests that a query of multi-stream sends together.
        queries: end a closed loop after so many; 0: after `duration`.
        timeout: seconds until a request is given up.
        processes, connections: of the load generator, and of each of its processes.
        realtime: whether these are scheduled before all other programs.
        times: how often its capacity an overloaded server is offered.
        reload_every: seconds from one reload of the models to the next.
        fail_on: conditions that fail the run.
        slices: parts into which the run's time is cut.

    Raises:
        SettingsError: a setting is out of its range.
    """

    scenario: Scenario = "server"
    rates: tuple[float, ...] = ()
    ramp: bool = False
    arrivals: Arrivals = "poisson"
    burst_on: float = 1.0
    burst_off: float = 1.0
    trace: Path | None = None
    duration: float = 10.0
    warmup: float = 1.0
    seed: int = 0
    users: int = 1
    samples_per_query: int = 8
    queries: int = 0
    timeout: float = 10.0
    processes: int = 1
    connections: int = 1
    realtime: bool = False
    times: float = 10.0
    reload_every: float = 2.0
    fail_on: tuple[Condition, ...] = ()
    slices: int = 40

    def __post_init__(self) -> None:
        for name in ("duration", "timeout", "times", "reload_every", "burst_on"):
            self._check(name, 0 < getattr(self, name) < math.inf, "more than 0")
        for name in ("warmup", "burst_off", "queries", "seed"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name, most in (
            ("users", MOST_USERS), ("processes", MOST_PROCESSES), ("connections", 1024),
            ("samples_per_query", 1024), ("slices", 10_000),
        ):  # fmt: skip
            self._check(name, 1 <= getattr(self, name) <= most, f"1 to {most}")
        if any(not 0 < rate < math.inf for rate in self.rates):
            raise SettingsError(f"--rate is {list(self.rates)}, expected more than 0 requests/s")
        if self.open_loop and self.scenario != "overload" and not self.rates and not self.trace:
            raise SettingsError(f"scenario '{self.scenario}' needs --rate, requests per second")

    def _check(self, name: str, good: bool, expected: str) -> None:  # noqa: FBT001 - a check's outcome
        if not good:
            raise SettingsError(f"--{name.replace('_', '-')} is {getattr(self, name):g}, expected {expected}")

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent at times of their own."""
        return self.scenario in OPEN_LOOPS

    @property
    def limit_ms(self) -> float | None:
        """The tightest latency that the conditions allow; None: they name none."""
        return min((c.limit_ms for c in self.fail_on if c.limit_ms is not None), default=None)
