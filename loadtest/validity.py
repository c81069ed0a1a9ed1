"""Whether a run's figures are the server's: rules that a load generator must hold itself to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadtest.latency import Histogram

if TYPE_CHECKING:
    from loadtest.generator import Recording

LAG_MS, LAG_OF_TARGET = 2.0, 0.1
BUSIEST_CORE = 0.8
ACHIEVED = 0.99
INTERRUPTED = "it was interrupted"


@dataclass(frozen=True)
class Validity:
    """A judgement of the load generator, not of the server.

    Attributes:
        reasons: why the figures are not to be believed; none: they are.
        lag_p99: milliseconds by which requests were sent late.
        busiest_core: the share of a core that the busiest process of the generator computed.
        achieved: requests that came back, of those that were to, in the time of the run.
        generator_limited: whether the generator is why; else it is the server, or the user who interrupted.
    """

    reasons: tuple[str, ...]
    lag_p99: float
    busiest_core: float
    achieved: float
    generator_limited: bool = False

    @property
    def valid(self) -> bool:
        """Whether the figures can be believed."""
        return not self.reasons


def judge(
    recording: Recording, target_ms: float | None = None, *, open_loop: bool, overload: bool = False
) -> Validity:
    """Judge a run.

    Args:
        recording: of the run.
        target_ms: the latency that it is to prove, if any: the generator may be late by a tenth of it.
        open_loop: whether requests had a schedule.
        overload: whether more was offered than can be answered on purpose.
    """
    samples = recording.samples
    reasons: list[str] = []
    lag = Histogram(samples.sent - samples.scheduled).percentile(99) if open_loop else 0.0
    allowed = max(LAG_MS, LAG_OF_TARGET * (target_ms or 0.0))
    busiest = max(recording.cpu, default=0.0)
    achieved = _achieved(recording) if open_loop and len(samples) else 1.0
    if not len(samples):
        reasons.append("no request was sent")
    if lag > allowed:
        reasons.append(
            f"the generator lagged: p99 {lag:.2f} ms behind the schedule, at most {allowed:g} ms: lower the "
            "rate, use more --processes, or give it a core of its own"
        )
    if busiest > BUSIEST_CORE:
        reasons.append(
            f"the generator was busy: {busiest:.0%} of a core, at most {BUSIEST_CORE:.0%}: its own time "
            "is in the latencies; use more --processes, or fewer users"
        )
    if achieved < ACHIEVED and not overload:
        reasons.append(
            f"achieved {achieved:.1%} of the offered rate, at least {ACHIEVED:.0%}: requests queued up "
            "for as long as the run lasted, so its percentiles say how long that was"
        )
    if recording.interrupted:
        reasons.append(INTERRUPTED)
    return Validity(tuple(reasons), lag, busiest, achieved, lag > allowed or busiest > BUSIEST_CORE)


def _achieved(recording: Recording) -> float:
    """The share of requests that came back in the time of the run, moved by what a request usually takes.

    A request that was sent just before the end can't be back by then. In a run that keeps up, the usual time
    is that of its first half; in one that doesn't, the second half takes longer.
    """
    samples = recording.samples
    end = recording.seconds * 1e9
    took = samples.done - samples.scheduled
    early = took[samples.scheduled <= end / 2]
    usual = float(np.median(early)) if len(early) else float(np.median(took))
    # What a schedule's last requests are short of by chance, too: not one of a hundred, of few requests one.
    back = int((samples.done <= end + usual).sum())
    slack = 3 * np.sqrt(max(1.0, len(samples) * min(1.0, usual / max(end, 1.0))))
    return float(min(1.0, (back + slack) / len(samples)))
