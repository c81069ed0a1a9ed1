"""Triton's sequence batching: which sequences' requests run next. No tensors, threads or clock of its own.

A sequence is what a client does under one correlation id, from a request with START to one with END. Its
requests run in order, one at a time; those of different sequences run together. So many sequences have a
slot, the others wait in the backlog; `live_sequences` says how each may end. No request is bound to a row of
the batch: an ONNX graph keeps nothing between two runs, what a sequence keeps is in its record.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from serve.errors import CanceledError, DeadlineExceededError, InvalidArgumentError
from serve.scheduling.live_sequences import LiveSequence, LiveSequences, SequenceStep
from serve.scheduling.scheduler import Decision, drop_reason

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from serve.request import Parameter
    from serve.scheduling.scheduler import QueuedRequest
    from serve.scheduling.sequence_config import SequenceSettings

_UINT64 = (1 << 64) - 1
_LONGEST_ID = 128  # bytes of a textual id, Triton's limit
_MICROSECOND = 1e-6

_log = logging.getLogger(__name__)


class SequenceScheduler:
    """Batches the requests of live sequences (a `serve.scheduling.scheduler.Scheduler`).

    `finished` looks at the futures to see whose request was given up: they must be settled by then.

    Attributes:
        settings: what it was made with.
    """

    immediate = False

    def __init__(self, settings: SequenceSettings) -> None:
        self.settings = settings
        self._sequences = LiveSequences(settings)
        self._runs = 0
        datatype = settings.id_datatype
        self._id_type = None if datatype is None else str if datatype.name == "BYTES" else int

    def __len__(self) -> int:
        """Requests that wait for a run, or to be dropped by the next decision."""
        return self._sequences.waiting + len(self._sequences.dropped)

    @property
    def live(self) -> int:
        """Sequences at once, with a slot or in the backlog."""
        return self._sequences.count

    def enqueue(self, queued: QueuedRequest, now: float) -> None:
        """Add a request to its sequence.

        Raises:
            InvalidArgumentError: it has no sequence id, or more than one row, or is the first one of its
                sequence but not marked so.
            UnavailableError: it would begin a sequence too many.
        """
        model, parameters = queued.request.model_name, queued.request.parameters
        name = self._sequence_id(model, parameters.get("sequence_id", 0))
        if queued.rows > 1:
            raise InvalidArgumentError(
                f"inference request to model '{model}' must specify batch-size 1 due to requirements of "
                "sequence batcher"
            )
        start = bool(parameters.get("sequence_start", False))
        self._sequences.expire(now)
        sequence = self._sequences.find(name)
        if sequence is None:
            if not start:
                raise InvalidArgumentError(
                    f"inference request for sequence {name} to model '{model}' must specify the START flag "
                    "on the first request of the sequence"
                )
            sequence = self._sequences.begin(name, model)
        elif start:
            _log.warning("model '%s': sequence %s starts again before its END, which ends it", model, name)
        queued.sequence = SequenceStep(sequence, start, bool(parameters.get("sequence_end", False)), now)
        timeout = parameters.get("timeout", 0)
        self._sequences.append(queued, timeout * _MICROSECOND if isinstance(timeout, int) else 0)

    def next(self, now: float) -> Decision:
        """The requests to run together: one each of sequences that are ready, the longest ready first."""
        sequences = self._sequences
        sequences.expire(now)
        candidates: list[LiveSequence] = []
        # Again, as dropping all that were ready may have given their slots to sequences of the backlog.
        while sequences.ready and not candidates and not (self.settings.preserve_ordering and self._runs):
            candidates = self._candidates(now)
        size, again_at = self._batch_size(candidates, now)
        batch = [sequences.take(sequence) for sequence in candidates[:size]]
        self._runs += bool(batch)
        dropped, sequences.dropped = sequences.dropped, []
        wake_at = min(again_at, sequences.next_expiry())
        return Decision(batch, dropped, None if wake_at == math.inf else wake_at)

    def finished(self, batch: Sequence[QueuedRequest], now: float) -> None:
        """A batch's futures are settled: its sequences may go on."""
        self._runs -= 1
        for queued in batch:
            self._sequences.answered(queued.sequence.sequence, now, given_up=_given_up(queued))

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a cancelled request out; the next decision drops those that depend on it."""
        return queued.sequence is not None and self._sequences.remove(queued)

    def drain(self) -> None:
        """No sequence begins any more, and one that would wait for its next request ends instead."""
        self._sequences.drain()

    def _sequence_id(self, model: str, name: Parameter) -> int | str:
        if isinstance(name, bool | float) or not name:
            raise InvalidArgumentError(
                f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID"
            )
        if isinstance(name, str) and len(name.encode()) > _LONGEST_ID:
            raise InvalidArgumentError(
                f"model '{model}': sequence_id has {len(name.encode())} bytes, expected {_LONGEST_ID} at most"
            )
        if self._id_type is not None and not isinstance(name, self._id_type):
            expected = "text" if self._id_type is str else "a number"
            raise InvalidArgumentError(
                f"model '{model}': sequence_id is {name!r}, the model takes {expected}"
            )
        return name & _UINT64 if isinstance(name, int) else name

    def _candidates(self, now: float) -> list[LiveSequence]:
        """The sequences whose next requests may run together now; the dead ones are dropped on the way."""
        found: list[LiveSequence] = []
        key: Hashable = None
        for sequence in tuple(self._sequences.ready):
            while sequence.queue and (reason := drop_reason(sequence.queue[0], now)) is not None:
                self._sequences.drop_first(sequence, reason)
            if not sequence.queue:
                continue
            own_key = self._batch_key(sequence)
            key = own_key if not found else key
            if own_key == key:
                found.append(sequence)
                if len(found) == self.settings.max_rows:
                    break
        return found

    def _batch_key(self, sequence: LiveSequence) -> Hashable:
        """Requests run together only where this is equal: the inputs' and the states' shapes."""
        first = sequence.queue[0]
        starts = first.sequence.start
        return first.shape, self.settings.first_state_shape if starts else sequence.state_shape

    def _batch_size(self, candidates: Sequence[LiveSequence], now: float) -> tuple[int, float]:
        """How many of the candidates to run now, and when to ask again if that is none."""
        settings, count = self.settings, len(candidates)
        if not count:
            return 0, math.inf
        preferred = max((size for size in settings.preferred_sizes if size <= count), default=0)
        if not settings.max_queue_delay:
            return preferred or count, math.inf
        due = min(sequence.queue[0].sequence.arrived for sequence in candidates) + settings.max_queue_delay
        if now >= due:
            return count, math.inf
        if settings.oldest:
            return preferred, math.inf if preferred else due
        if len(self._sequences.ready) >= settings.minimum_slot_utilization * settings.max_rows:
            return count, math.inf
        return 0, due


def _given_up(queued: QueuedRequest) -> bool:
    """Whether a request was cancelled, or its run terminated: nobody knows whether its state is there."""
    future = queued.future
    return future.cancelled() or (
        future.done() and isinstance(future.exception(), CanceledError | DeadlineExceededError)
    )
