"""The records that pass between a transport and the core.

Not frozen, though nothing changes them: a frozen dataclass takes twice as long to make, and each request
makes five of these.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    import numpy as np

    from serve.datatypes import DataType

Parameter = bool | int | float | str


@dataclass(slots=True)
class Tensor:
    """A named array with its wire datatype (an array alone can't tell BF16 from UINT16)."""

    name: str
    datatype: DataType
    array: np.ndarray


@dataclass(slots=True)
class RequestedOutput:
    """An output that a request names; `classification` > 0 asks for that many top classes instead."""

    name: str
    classification: int = 0


class Call:
    """One request's deadline and cancellation, as its transport knows them.

    A transport calls `cancel` from any thread, once or more, also after the end. A request that waits is then
    answered at once; one that runs alone is terminated at the graph's next node.
    """

    __slots__ = ("cancelled", "deadline", "future", "queued_ns", "received_ns", "run_options")

    def __init__(self, deadline: float | None = None) -> None:
        """Start now; `deadline` is on the `time.monotonic` clock in seconds, None for no limit."""
        self.deadline = deadline
        self.received_ns = self.queued_ns = time.monotonic_ns()
        self.cancelled = False
        self.future: Future[Any] | None = None
        self.run_options: Any = None

    def expired(self, now: float) -> bool:
        """Whether the deadline has passed at `now`, in seconds on its clock."""
        return self.deadline is not None and now >= self.deadline

    def cancel(self) -> None:
        """Give the request up."""
        self.cancelled = True
        if self.future is not None:
            self.future.cancel()
        run_options = self.run_options
        if run_options is not None:
            run_options.terminate = True


@dataclass(slots=True)
class InferRequest:
    """A decoded ModelInfer request."""

    model_name: str
    model_version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(slots=True)
class InferResponse:
    """What the model answered, ready to encode."""

    model_name: str
    model_version: str
    id: str
    outputs: tuple[Tensor, ...]
