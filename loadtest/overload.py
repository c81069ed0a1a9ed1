"""The overload scenario: many times what the server can answer, with deadlines; what still gets through."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loadtest.run import run

if TYPE_CHECKING:
    from loadtest.result import RunResult
    from loadtest.run import Setting
    from loadtest.settings import LoadSettings

# Enough to keep a server with a few instances busy, without filling its queue.
_CAPACITY_USERS = 8
_CAPACITY_SECONDS = 5.0


def run_overload(setting: Setting, settings: LoadSettings) -> RunResult:
    """Measure the capacity by a closed loop, unless `--rate` says it, and offer so many times as much.

    The result's `goodput_ratio` is what was answered in time per second, of the capacity.
    """
    notes = []
    if settings.rates:
        capacity = settings.rates[0]
    else:
        closed = replace(
            settings, scenario="closed", users=_CAPACITY_USERS, fail_on=(),
            duration=min(_CAPACITY_SECONDS, settings.duration),
        )  # fmt: skip
        capacity = run(setting, closed).total.throughput
        notes.append(f"capacity: {capacity:.1f} requests/s by a closed loop of {_CAPACITY_USERS} users")
    offered = replace(settings, rates=(max(capacity, 1.0) * settings.times,), warmup=0.0, ramp=False)
    result = run(setting, offered, capacity=capacity)
    result.notes += notes
    return result
