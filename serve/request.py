"""The records that pass between a transport and the core.

Not frozen, though nothing changes them: a frozen dataclass takes twice as long to make, and each request
makes five of these.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve.errors import CanceledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    import numpy as np

    from serve.protocol.datatypes import DataType
    from serve.protocol.shared_memory import Region

Parameter = bool | int | float | str


@dataclass(slots=True)
class SharedArea:
    """Where a tensor lies in the client's shared memory.

    Attributes:
        region: name that the region is registered under.
        offset: of the first byte, from the region's start.
        byte_size: how many bytes.
        memory: the region itself; None until the core has looked it up.
    """

    region: str
    offset: int
    byte_size: int
    memory: Region | None = None


@dataclass(slots=True)
class Tensor:
    """A named array with its wire datatype (an array alone can't tell BF16 from UINT16).

    Attributes:
        name: the input's or output's.
        datatype: of the elements.
        array: the elements.
        shared_memory: where an answer's bytes go; None: into the message.
    """

    name: str
    datatype: DataType
    array: np.ndarray
    shared_memory: SharedArea | None = None


@dataclass(slots=True)
class SharedInput:
    """An input whose bytes the client left in shared memory: read once the request is let in."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    area: SharedArea


@dataclass(slots=True)
class RequestedOutput:
    """An output that a request names.

    Attributes:
        name: the output's.
        classification: above 0: that many top classes instead of the tensor.
        shared_memory: where the client wants the tensor's bytes; None: in the message.
    """

    name: str
    classification: int = 0
    shared_memory: SharedArea | None = None


class Call:
    """One request's deadline, cancellation and times, as its transport and its model know them.

    A transport calls `cancel` from any thread, once or more, also after the end. A request that waits is then
    answered at once and leaves its queue; one that runs alone is terminated at the graph's next node.

    Attributes:
        deadline: on the `time.monotonic` clock in seconds, None for no limit.
        cancelled: whether the client has given up.
        future: the answer's, once the model has taken the request.
        leave_queue: removes the request from the queue that it waits in; None: it doesn't wait.
        run_options: onnxruntime's, of the run that serves this call alone.
        received_ns, queued_ns, started_ns, ready_ns, ran_ns, done_ns: `time.monotonic_ns()` when the request
            was received, decoded, taken out of the queue, when its inputs were ready, when the graph had run
            and when its outputs were ready; 0: not yet.
        rows: batch size; 0: the request never reached its model.
    """

    __slots__ = (
        "cancelled", "deadline", "done_ns", "future", "leave_queue", "queued_ns", "ran_ns", "ready_ns",
        "received_ns", "rows", "run_options", "started_ns",
    )  # fmt: skip

    def __init__(self, deadline: float | None = None) -> None:
        """Start now; `deadline` is on the `time.monotonic` clock in seconds, None for no limit."""
        self.deadline = deadline
        self.received_ns = self.queued_ns = time.monotonic_ns()
        self.started_ns = self.ready_ns = self.ran_ns = self.done_ns = 0
        self.rows = 0
        self.cancelled = False
        self.future: Future[Any] | None = None
        self.leave_queue: Callable[[], None] | None = None
        self.run_options: Any = None

    def expired(self, now: float) -> bool:
        """Whether the deadline has passed at `now`, in seconds on its clock."""
        return self.deadline is not None and now >= self.deadline

    def cancel(self) -> None:
        """Give the request up."""
        self.cancelled = True
        future = self.future
        if future is not None:
            if future.cancel():
                leave_queue = self.leave_queue  # may become None at any time
                if leave_queue is not None:
                    leave_queue()
            elif not future.done():
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(CanceledError("the request was cancelled while it ran"))
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
    shared_inputs: tuple[SharedInput, ...] = ()
    """Inputs that are still in shared memory; the core moves them to `inputs`."""


@dataclass(slots=True)
class InferResponse:
    """What the model answered, ready to encode."""

    model_name: str
    model_version: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
