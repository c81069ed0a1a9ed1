"""How long a graph takes in this process: no network, no queue, one thread."""

from __future__ import annotations

import math
import statistics
import time
from itertools import chain
from typing import TYPE_CHECKING

from export.session import cycle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from export.session import Session

BATCHES = (1, 8)
ROUNDS = 15
FEWEST_ROUNDS = 5
RUNS = 10
TURN_SECONDS = 0.25
LIMIT_SECONDS = 6.0
SETTLED = 0.01


def measure(
    sessions: Mapping[str, Session], inputs: Mapping[str, np.ndarray], batch: int
) -> dict[str, float]:
    """Median latency of several graphs side by side.

    Args:
        sessions: name to loaded graph.
        inputs: rows to take the batch from.
        batch: rows per run.

    Returns:
        Name to milliseconds per run.
    """
    rows = cycle(inputs, batch)
    return interleave({name: (session, rows) for name, session in sessions.items()})


def interleave(runs: Mapping[str, tuple[Session, Mapping[str, np.ndarray]]]) -> dict[str, float]:
    """Median latency of several graphs, each on its own arrays.

    The graphs take turns, so that a change in the machine's speed meets all of them. A turn is ten runs, or
    those that begin within 0.25 s, after two that aren't counted: each graph is measured with its weights in
    the cache, as it is served. Turns end after 15 rounds or 6 seconds, or from the fifth round on when all
    medians have settled.

    Returns:
        Name to milliseconds per run.
    """
    turns: dict[str, list[list[float]]] = {name: [] for name in runs}
    end = time.perf_counter() + LIMIT_SECONDS
    for _ in range(ROUNDS):
        for name, (session, inputs) in runs.items():
            turns[name].append(_turn(session, inputs))
        if time.perf_counter() > end or all(map(_is_settled, turns.values())):
            break
    return {name: 1000 * statistics.median(chain.from_iterable(times)) for name, times in turns.items()}


def _is_settled(turns: Sequence[Sequence[float]]) -> bool:
    """Whether the turns' medians agree to 1 %.

    By McGill's notch: 1.57 × interquartile range / √n on either side of a median covers the true one in about
    95 of 100 cases (McGill, Tukey and Larsen, "Variations of Box Plots", 1978).
    """
    if len(turns) < FEWEST_ROUNDS:
        return False
    medians = [statistics.median(turn) for turn in turns]
    lower, middle, upper = statistics.quantiles(medians, n=4, method="inclusive")
    return 1.57 * (upper - lower) / math.sqrt(len(medians)) < SETTLED * middle


def _turn(session: Session, inputs: Mapping[str, np.ndarray]) -> list[float]:
    """Seconds of each run of a turn."""
    session.run(inputs)
    session.run(inputs)
    seconds = [_timed(session, inputs)]
    while len(seconds) < RUNS and sum(seconds) < TURN_SECONDS:
        seconds.append(_timed(session, inputs))
    return seconds


def _timed(session: Session, rows: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(rows)
    return time.perf_counter() - start
