"""From a run's settings to its load: the scenarios of MLPerf, and those of operating a server.

single-stream, multi-stream, server and offline follow MLPerf Inference's definitions: one query after the
other; one query of several samples after the other; queries that arrive as a Poisson process; everything as
fast as it goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loadtest.driver import ClosedLoad, OpenLoad
from loadtest.schedule import (
    Process,
    RateProfile,
    ScheduleError,
    arrivals,
    bursts,
    ramp,
    read_trace,
    steady,
    steps,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loadtest.payload import ModelLoad
    from loadtest.settings import LoadSettings

# Draws of which model a user asks, taken in turn.
_PICKS = 1 << 16
# Requests under way at a time in the offline scenario, where nobody waits for a single one.
OFFLINE_USERS = 32


def make_load(settings: LoadSettings, models: Sequence[ModelLoad], seed: int) -> OpenLoad | ClosedLoad:
    """Draw a run's load.

    Args:
        settings: of the run.
        models: that are asked, by their weights.
        seed: of all draws.

    Raises:
        ScheduleError: rates or a trace that make no schedule.
    """
    if not settings.open_loop:
        return _closed(settings, models, seed)
    if settings.trace:
        offsets, names = read_trace(settings.trace)
        index = {model.spec.name: n for n, model in enumerate(models)}
        if unknown := set(names) - index.keys():
            raise ScheduleError(
                f"trace '{settings.trace}' asks model '{min(unknown)}': name it with --model, too"
            )
        kept = offsets <= settings.duration * 1e9
        picked = np.array([index[name] for name in names], np.int64) if names else None
        return _open(offsets[kept], models, seed, picked if picked is None else picked[kept])
    process: Process = "constant" if settings.arrivals == "constant" else "poisson"
    return _open(arrivals(profile_of(settings), process, seed), models, seed, None)


def profile_of(settings: LoadSettings) -> RateProfile:
    """The rate over time that the settings ask for.

    Raises:
        ScheduleError: there is none.
    """
    rates, seconds = settings.rates, settings.duration
    if settings.arrivals == "burst":
        return bursts(float(np.mean(rates)), seconds, settings.burst_on, settings.burst_off)
    if settings.ramp:
        return ramp(rates[0], rates[-1], seconds)
    return steady(rates[0], seconds) if len(rates) == 1 else steps(rates, seconds)


def _closed(settings: LoadSettings, models: Sequence[ModelLoad], seed: int) -> ClosedLoad:
    picked = _pick(models, _PICKS if len(models) > 1 else 1 << 10, seed)
    per_query = settings.samples_per_query if settings.scenario == "multi-stream" else 1
    return ClosedLoad(
        settings.users, settings.duration, picked, _in_turn(models, picked), per_query, settings.queries
    )


def _open(
    offsets: NDArray[np.int64], models: Sequence[ModelLoad], seed: int, picked: NDArray[np.int64] | None
) -> OpenLoad:
    if picked is None:
        picked = _pick(models, len(offsets), seed)
    return OpenLoad(offsets, picked, _in_turn(models, picked))


def _pick(models: Sequence[ModelLoad], count: int, seed: int) -> NDArray[np.int64]:
    """Which model each request asks, drawn by the weights."""
    weights = np.array([model.spec.weight for model in models])
    random = np.random.default_rng((seed, 1))
    return random.choice(len(models), count, p=weights / weights.sum()).astype(np.int64)


def _in_turn(models: Sequence[ModelLoad], picked: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of its model's requests each is: one after the other."""
    requests = np.zeros(len(picked), np.int64)
    for index, model in enumerate(models):
        rows = picked == index
        requests[rows] = np.arange(rows.sum()) % len(model.requests)
    return requests


def describe(settings: LoadSettings, load: OpenLoad | ClosedLoad) -> str:
    """A load in words."""
    seconds = f"{settings.duration:g} s"
    if isinstance(load, ClosedLoad):
        users = f"closed loop, {load.users} user{'s' if load.users > 1 else ''}"
        together = f", {load.per_query} requests together" if load.per_query > 1 else ""
        queries = f" or {load.most_queries} queries" if load.most_queries else ""
        return f"{users}{together}, for {seconds}{queries}"
    if settings.trace:
        return f"open loop, {len(load.offsets)} arrivals of trace '{settings.trace.name}'"
    rates = [f"{rate:g}" for rate in settings.rates]
    shape = f"{rates[0]} to {rates[-1]}" if settings.ramp else ", ".join(rates)
    kind = {"poisson": "Poisson", "constant": "constant", "burst": "burst"}[settings.arrivals]
    return f"open loop, {kind} arrivals at {shape} requests/s, for {seconds}"


def warmup_of(settings: LoadSettings) -> LoadSettings:
    """The same load for the time of the warm-up."""
    seconds = min(settings.warmup, settings.duration)
    trace = None if settings.rates or not settings.open_loop else settings.trace
    return replace(settings, duration=seconds, trace=trace, queries=0)
