"""What a run left behind: one row of times for each request, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

OK = 0
# Beside gRPC's own codes, 0 to 16:
UNSENT, IN_STREAM = 100, 101
STATUS_NAMES: dict[int, str] = {
    **{code.value[0]: code.name for code in grpc.StatusCode},
    UNSENT: "UNSENT",
    IN_STREAM: "ERROR_IN_STREAM",
}


def _empty(kind: type) -> NDArray[np.int64]:
    return np.zeros(0, kind)


@dataclass
class Samples:
    """Times are nanoseconds from the start of the run; arrays are as long as there were requests.

    Attributes:
        model: index of the request's model.
        scheduled: when it was to be sent; in a closed loop, when it was.
        sent: when it was.
        done: when its answer, or its last one, was there, or its failure.
        status: gRPC's code, or `UNSENT` (too many were under way), or `IN_STREAM` (an error message in a
            stream).
        first: when the first answer of a stream was there; 0: none was.
        tokens: how many tokens, or answers of a stream where it doesn't say, came.
        gap_model: of each pause between two answers of a stream, the index of the model.
        gap: how long it was, for each token of the answer that ended it.
        messages: what the server said with the first failure of each status.
    """

    model: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    scheduled: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    sent: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    done: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    status: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    first: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    tokens: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    gap_model: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    gap: NDArray[np.int64] = field(default_factory=lambda: _empty(np.int64))
    messages: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scheduled)

    def where(self, rows: NDArray[np.bool_]) -> Samples:
        """Those of some requests; pauses stay as they are."""
        kept = {name: getattr(self, name)[rows] for name in _ROWS}
        return Samples(**kept, gap_model=self.gap_model, gap=self.gap, messages=self.messages)

    def of_model(self, index: int) -> Samples:
        """Those of one model."""
        found = self.where(self.model == index)
        found.gap_model, found.gap = (array[self.gap_model == index] for array in (self.gap_model, self.gap))
        return found


_ROWS = ("model", "scheduled", "sent", "done", "status", "first", "tokens")


def merge(parts: Sequence[Samples]) -> Samples:
    """The samples of several processes or threads as one, in the order of their schedule."""
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts] or [_empty(np.int64)])
        for name in (*_ROWS, "gap_model", "gap")
    }
    order = np.argsort(joined["scheduled"], kind="stable")
    joined |= {name: joined[name][order] for name in _ROWS}
    messages: dict[int, str] = {}
    for part in reversed(parts):
        messages |= part.messages
    return Samples(**joined, messages=messages)
