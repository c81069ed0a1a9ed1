"""How long a graph takes in this process: no network, no queue, one thread."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from export.session import cycle

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from export.session import Session

BATCHES = (1, 8)
ROUNDS = 15
RUNS = 10
LIMIT_SECONDS = 6.0


def measure(
    sessions: Mapping[str, Session], inputs: Mapping[str, np.ndarray], batch: int
) -> dict[str, float]:
    """Median latency of several graphs side by side.

    The graphs take turns, so that a change in the machine's speed meets all of them. A turn is ten runs after
    two that aren't counted: each graph is measured with its own weights in the cache, as it is served. Turns
    end after 15 rounds or 6 seconds.

    Args:
        sessions: name to loaded graph.
        inputs: rows to take the batch from.
        batch: rows per run.

    Returns:
        Name to milliseconds per run.
    """
    rows = cycle(inputs, batch)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + LIMIT_SECONDS
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            session.run(rows)
            session.run(rows)
            seconds[name] += [_timed(session, rows) for _ in range(RUNS)]
        if time.perf_counter() > end:
            break
    return {name: statistics.median(values) * 1000 for name, values in seconds.items()}


def _timed(session: Session, rows: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(rows)
    return time.perf_counter() - start


def processor() -> dict[str, str]:
    """Model and integer dot product instructions of this processor, as Linux reports them."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    dot_products = [flag for flag in flags if "vnni" in flag or flag in {"asimddp", "i8mm"}]
    return {
        "model": fields.get("model name", "unknown"),
        "dot_products": " ".join(dot_products) or "none",
    }
