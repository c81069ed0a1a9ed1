"""The step of continuous batching, over and over: schedule → run → sample → emit."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from serve.errors import InternalError, RetiredError, ServeError
from serve.generate.sequence import LENGTH
from serve.generate.step import Step

if TYPE_CHECKING:
    import numpy as np

    from serve.generate.scheduler import GenerationScheduler
    from serve.generate.sequence import Sequence

logger = logging.getLogger(__name__)

_SECONDS_AFTER_A_FAULT = 0.1


class Runs(Protocol):
    """What the engine needs of a runner."""

    def run(self, step: Step) -> list[tuple[Sequence, np.ndarray]]:
        """Carry a step out; FP32 [vocabulary] of each sequence whose next token can be chosen."""


class EngineMetrics(Protocol):
    """What the engine tells of its work. Called from its thread, once a step or a token: must be cheap."""

    def step(self, tokens: int, rows: int, seconds: float) -> None:
        """One step read `tokens` tokens, of which `rows` were streams' latest ones."""

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """A sequence's first token, so long after its request had come."""

    def token(self, seconds: float) -> None:
        """A later one, so long after the one before it."""

    def finished(self, sequence: Sequence) -> None:
        """A text is complete."""

    def failed(self, sequence: Sequence, error: ServeError) -> None:
        """A text won't be completed."""


class GenerationEngine:
    """Generates the texts that are submitted, together, on a thread of its own.

    Sequences join and leave at every step. What happens to one of them is its own affair: a sampler or an
    output that fails ends that sequence alone.
    """

    def __init__(
        self, name: str, scheduler: GenerationScheduler, runner: Runs, metrics: EngineMetrics
    ) -> None:
        """Start the thread; `name` is the thread's."""
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the cache."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Sequences that have one."""
        return self._scheduler.running

    @property
    def cache_usage(self) -> float:
        """How much of the cache is in use, from 0 to 1."""
        return self._scheduler.cache_usage

    def submit(self, sequence: Sequence) -> None:
        """Have a text generated; its output gets the tokens.

        Raises:
            RetiredError: `close` was called.
            UnavailableError: too many wait.
            InvalidArgumentError: it can never fit into the cache.
        """
        with self._wake:
            if self._closed:
                raise RetiredError
            self._scheduler.add(sequence, time.monotonic())
            self._wake.notify()

    def close(self) -> None:
        """Complete what was submitted, then end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        goes_on = True
        while goes_on:
            try:
                goes_on = self._step()
            except Exception:
                # A fault of the scheduler's; without this thread every later request would hang.
                logger.exception("generation failed in an unforeseen way")
                time.sleep(_SECONDS_AFTER_A_FAULT)

    def _step(self) -> bool:
        """One step; False: closed, and nothing is left to do."""
        step = self._schedule()
        if step is None:
            return False
        for sequence, error in step.dropped:
            self._fail(sequence, error)
        if step.runs or step.released:
            for sequence, logits in self._run(step):
                self._sample(sequence, logits)
        return True

    def _schedule(self) -> Step | None:
        """Wait until there is something to do, and decide what; None: closed, and nothing is left."""
        with self._wake:
            while not self._scheduler.has_work:
                if self._closed:
                    return None
                self._wake.wait()
            return self._scheduler.next(time.monotonic())

    def _run(self, step: Step) -> list[tuple[Sequence, np.ndarray]]:
        start = time.monotonic_ns()
        for sequence in (*step.decode, *(chunk.sequence for chunk in step.prefill)):
            call = sequence.call
            call.started_ns = call.started_ns or start
        try:
            logits = self._runner.run(step)
        except Exception as error:  # noqa: BLE001 - whatever it is, the step is lost
            self._give_up(step, _serve_error(error, "a step of generation failed"))
            return []
        seconds = (time.monotonic_ns() - start) / 1e9
        with self._lock:
            self._scheduler.ran(step, seconds)
        if step.runs:  # and doesn't only give memory back
            self._metrics.step(step.tokens, len(step.decode), seconds)
        return logits

    def _give_up(self, step: Step, error: ServeError) -> None:
        """End whatever a failed run was for; what it left in the cache can't be relied on."""
        for sequence in (*step.decode, *(chunk.sequence for chunk in step.prefill)):
            with self._lock:
                self._scheduler.finish(sequence)
            self._fail(sequence, error)
        with self._lock:
            released = self._scheduler.forget_prefixes()
        self._runner.run(Step(released=released))

    def _sample(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Choose a sequence's next token and hand it on."""
        try:
            token = sequence.sampler.next(logits, sequence.ids, sequence.prompt_length)
            sequence.ids.append(token)
            self._time_token(sequence)
            reason = sequence.output.take(token)
        except Exception as error:  # noqa: BLE001 - it is this sequence's alone
            self._finish(sequence)
            self._fail(sequence, _serve_error(error, "a token could not be handed on"))
            return
        if reason is None and sequence.generated >= sequence.max_tokens:
            reason = LENGTH
        if reason is not None:
            self._finish(sequence)
            self._metrics.finished(sequence)
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Hand on that a text is complete, when its place is free and it is counted."""
        try:
            sequence.output.end(reason)
        except Exception as error:  # noqa: BLE001 - it is this sequence's alone
            sequence.output.fail(_serve_error(error, "the end of a text could not be handed on"))

    def _time_token(self, sequence: Sequence) -> None:
        now = time.monotonic()
        if sequence.token_at:
            self._metrics.token(now - sequence.token_at)
        else:
            self._metrics.first_token(sequence, now - sequence.call.received_ns / 1e9)
        sequence.token_at = now

    def _finish(self, sequence: Sequence) -> None:
        with self._lock:
            self._scheduler.finish(sequence)

    def _fail(self, sequence: Sequence, error: ServeError) -> None:
        self._metrics.failed(sequence, error)
        try:
            sequence.output.fail(error)
        except Exception:
            logger.exception("a failure could not be handed on")


def _serve_error(error: Exception, what: str) -> ServeError:
    if isinstance(error, ServeError):
        return error
    logger.error("%s", what, exc_info=error)
    return InternalError(f"{what}: {error!r}")
