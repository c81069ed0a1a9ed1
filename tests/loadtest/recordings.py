"""Recordings and results that are made up, with figures that can be worked out by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from loadtest.figures import figures_of, slices_of
from loadtest.generator import Recording
from loadtest.result import RunResult
from loadtest.samples import Samples
from loadtest.validity import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def samples_of(
    scheduled: NDArray[np.int64], took: NDArray[np.int64], lag: int = 0, status: Sequence[int] | int = 0
) -> Samples:
    """Requests at times, each answered after so many nanoseconds."""
    zeros = np.zeros(len(scheduled), np.int64)
    codes = np.broadcast_to(np.asarray(status, np.int64), scheduled.shape).copy()
    return Samples(zeros, scheduled, scheduled + lag, scheduled + took, codes, zeros.copy(), zeros.copy())


def recording_of(samples: Samples, seconds: float, cpu: float = 0.2) -> Recording:
    """A run of these."""
    return Recording(samples, seconds, datetime(2026, 11, 1, tzinfo=UTC), (cpu,))


def result_of(samples: Samples, seconds: float, load: str = "open loop") -> RunResult:
    """The result of an open loop of one model."""
    figures = figures_of(samples, seconds)
    return RunResult(
        scenario="server", load=load, command=["--model", "m"], seed=0, started="2026-11-01T00:00:00+00:00",
        target={"url": "localhost:8001", "tls": "no", "server": "stub", "version": "1"},
        models=[{
            "name": "m", "version": "1", "weight": 1.0, "batch_size": 1, "request_bytes": 9, "streams": False,
        }],
        machine={"processor": "any"}, versions={"python": "3"}, total=figures, per_model={"m": figures},
        slices=slices_of(samples, seconds, 40),
        validity=judge(recording_of(samples, seconds), open_loop=True), bounds={"99": None},
    )  # fmt: skip
