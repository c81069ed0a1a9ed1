"""What the samples of a run come to: counts by status, and distributions of three times of each request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from loadtest.latency import Histogram
from loadtest.samples import OK, STATUS_NAMES

if TYPE_CHECKING:
    from loadtest.samples import Samples

SECOND_NS = 1_000_000_000


@dataclass
class StreamFigures:
    """Of answers that come token by token.

    Attributes:
        first_token: milliseconds from the schedule to the first.
        inter_token: from one to the next.
        tokens: all of them.
        tokens_per_second: over the run.
    """

    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    tokens: int = 0
    tokens_per_second: float = 0.0


@dataclass
class Figures:
    """Of a set of requests; the distributions are of those that were answered.

    Attributes:
        offered: requests that were to be sent.
        answered: those that got an answer.
        failures: status to count, of all others.
        seconds: how long the run was.
        throughput: answers per second, from the start to the end or to the last answer, whichever is later.
        latency: from the time of the schedule to the answer, which includes what a late client or an earlier
            slow answer cost: what a user sees.
        service: from the sending to the answer.
        lag: from the time of the schedule to the sending, of all requests: the load generator's own lateness.
        stream: of streams; None: there were none.
    """

    offered: int
    answered: int
    failures: Counter[str]
    seconds: float
    throughput: float
    latency: Histogram
    service: Histogram
    lag: Histogram
    stream: StreamFigures | None = None

    @property
    def failed(self) -> int:
        """How many got no answer, or an error for one."""
        return self.failures.total()

    def goodput(self, limit: float | None) -> float:
        """Answers per second that came within so many milliseconds; without a limit, all answers."""
        if limit is None or not self.answered:
            return self.throughput
        return self.throughput * self.latency.at_most(limit) / self.answered


def figures_of(samples: Samples, seconds: float) -> Figures:
    """The figures of a run, or of a part of its requests.

    Args:
        samples: of the requests.
        seconds: how long requests were sent.
    """
    good = samples.status == OK
    answered = int(good.sum())
    codes, counts = np.unique(samples.status[~good], return_counts=True)
    end = max(seconds, float(samples.done[good].max()) / SECOND_NS) if answered else seconds
    done, scheduled, sent = (array[good] for array in (samples.done, samples.scheduled, samples.sent))
    return Figures(
        offered=len(samples),
        answered=answered,
        failures=Counter(dict(zip(map(_name, codes.tolist()), counts.tolist(), strict=True))),
        seconds=seconds,
        throughput=answered / end if end > 0 else 0.0,
        latency=Histogram(done - scheduled),
        service=Histogram(done - sent),
        lag=Histogram(samples.sent - samples.scheduled),
        stream=_stream_figures(samples, end),
    )  # fmt: skip


def _name(code: int) -> str:
    return STATUS_NAMES.get(code, f"STATUS_{code}")


def _stream_figures(samples: Samples, seconds: float) -> StreamFigures | None:
    streamed = (samples.first > 0) & (samples.status == OK)
    if not streamed.any():
        return None
    tokens = int(samples.tokens.sum())
    return StreamFigures(
        Histogram((samples.first - samples.scheduled)[streamed]),
        Histogram(samples.gap),
        tokens,
        tokens / seconds if seconds > 0 else 0.0,
    )


@dataclass
class Slice:
    """A part of a run's time; a request belongs to the slice in which it was to be sent.

    Attributes:
        start, seconds: of it.
        offered, answered, failed: of its requests.
        under_way: requests without an answer at its end.
        latency: of its answers.
    """

    start: float
    seconds: float
    offered: int
    answered: int
    failed: int
    under_way: int
    latency: Histogram


def slices_of(samples: Samples, seconds: float, count: int) -> list[Slice]:
    """The run in so many parts of equal length."""
    edges = np.linspace(0, seconds, count + 1)
    good = samples.status == OK
    slot = np.clip(np.searchsorted(edges, samples.scheduled / SECOND_NS, "right") - 1, 0, count - 1)
    made = []
    for n in range(count):
        rows, end = slot == n, edges[n + 1] * SECOND_NS
        under_way = (samples.scheduled <= end) & (samples.done > end)
        answered = rows & good
        made.append(
            Slice(
                float(edges[n]), float(edges[n + 1] - edges[n]), int(rows.sum()), int(answered.sum()),
                int((rows & ~good).sum()), int(under_way.sum()),
                Histogram((samples.done - samples.scheduled)[answered]),
            )
        )  # fmt: skip
    return made
