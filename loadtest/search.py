"""The highest rate at which a server keeps a target: by doubling, by bisection, and confirmed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LOWEST_RATE = 0.1
_LARGEST_STEP = 0.5


@dataclass(frozen=True)
class Probe:
    """One run at one rate; times in milliseconds.

    Attributes:
        rate: requests per second that were offered.
        kept: whether the target was kept, and the server kept up.
        generator_limited: whether the load generator is why nothing can be said.
        why: what was missed.
        throughput, goodput: answers per second, and those within the target's latency.
        p50, p99, p999: of the latency from the schedule.
    """

    rate: float
    kept: bool
    generator_limited: bool = False
    why: str = ""
    throughput: float = 0.0
    goodput: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    p999: float = 0.0


@dataclass
class Found:
    """What a search came to.

    Attributes:
        rate: the highest that was confirmed; 0: none keeps the target.
        confirmations: how often it was.
        limit: `server`: more breaks the target; `generator`: this client can't send more; `bound`: nothing
            broke it.
        probes: all runs, in order.
    """

    rate: float = 0.0
    confirmations: int = 0
    limit: str = "server"
    probes: list[Probe] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @property
    def curve(self) -> list[Probe]:
        """The medians of the runs at each rate that the generator was fit for, by rate."""
        fit = sorted((p for p in self.probes if not p.generator_limited), key=lambda p: p.rate)
        return [_median(list(runs)) for _, runs in groupby(fit, key=lambda p: p.rate)]


def _median(probes: list[Probe]) -> Probe:
    """As one run: most of them say whether the target is kept, each figure is the median."""
    figures = {
        name: median(getattr(probe, name) for probe in probes)
        for name in ("throughput", "goodput", "p50", "p99", "p999")
    }
    kept = 2 * sum(probe.kept for probe in probes) > len(probes)
    return Probe(probes[0].rate, kept, why=probes[-1].why, **figures)


class Search:
    """Looks for the highest rate; pure, the run is passed in.

    Args:
        probe: runs at a rate with a seed.
        precision: the part of the rate to which it is found.
        confirmations: how many runs in a row have to keep the target at the rate that is reported.
    """

    def __init__(
        self, probe: Callable[[float, int], Probe], precision: float = 0.01, confirmations: int = 3
    ) -> None:
        self._probe = probe
        self._precision = precision
        self._confirmations = confirmations
        self._seed = 0
        self.found = Found()

    def run(self, start: float, most: float) -> Found:
        """Search from a rate, up to another one."""
        low, high = self._bracket(start, most)
        while low and high and high / low > 1 + self._precision:
            middle = (low * high) ** 0.5 if high / low > 2 else (low + high) / 2  # noqa: PLR2004 - far, near
            low, high = (middle, high) if self._kept(middle) else (low, middle)
        if low:
            self._confirm(low)
        return self.found

    def _bracket(self, start: float, most: float) -> tuple[float, float]:
        """(a rate that keeps the target, one that doesn't); 0: there is none."""
        low, high, rate = 0.0, 0.0, min(start, most)
        while not high:
            if self._kept(rate):
                low = rate
                if rate >= most:
                    self.found.limit = "bound"
                    break
                rate = min(2 * rate, most)
            else:
                high = rate
        while high and not low and (rate := high / 2) >= LOWEST_RATE:
            low, high = (rate, high) if self._kept(rate) else (0.0, rate)
        return low, high

    def _kept(self, rate: float) -> bool:
        """Whether the target is kept; a run that misses it is repeated, for any machine has a bad second."""
        return self._once(rate) or self._once(rate)

    def _once(self, rate: float) -> bool:
        self._seed += 1
        probe = self._probe(rate, self._seed)
        self.found.probes.append(probe)
        if probe.generator_limited:
            self.found.limit = "generator"
        elif not probe.kept:
            self.found.limit = "server"
        return probe.kept

    def _confirm(self, rate: float) -> None:
        """Go down, by larger steps each time, until so many runs in a row keep the target."""
        limit, step = self.found.limit, self._precision
        while rate >= LOWEST_RATE:
            kept = 0
            while kept < self._confirmations and self._once(rate):
                kept += 1
            if kept == self._confirmations:
                self.found.rate, self.found.confirmations = rate, kept
                break
            rate, step = rate * (1 - step), min(step + self._precision, _LARGEST_STEP)
        self.found.limit = limit
