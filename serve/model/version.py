"""One loaded model version: check → schedule → run → answer."""

from __future__ import annotations

import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from serve.errors import (
    CanceledError,
    InternalError,
    InvalidArgumentError,
    RetiredError,
    ServeError,
    UnavailableError,
)
from serve.model.answers import OrderedAnswers, give
from serve.model.encoded_image import decode_pool
from serve.model.implicit_state import ImplicitState
from serve.model.request_check import check_request, rows_and_shape
from serve.model.runner import Runner
from serve.model.statistics import Statistics
from serve.request import InferResponse
from serve.scheduling.choice import choose_scheduler, complete_scheduling
from serve.scheduling.executor import Executor
from serve.scheduling.scheduler import QueuedRequest
from serve.scheduling.sequence import SequenceScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from serve.loading.warmup import WarmUp
    from serve.model.model_config import ModelConfig
    from serve.request import Call, InferRequest
    from serve.runtime.session import Session
    from serve.settings import ServerSettings


class ModelVersion:
    """A model version that answers requests.

    Attributes:
        name, version, config: what it is.
        decoupled: whether it may answer a request several times.
        statistics: what it has answered so far.
        memory_bytes: what loading it added to the process's memory.
        warm_up: what was measured when it was loaded.
        shares_runs: whether several requests may be answered by one run.
    """

    decoupled = False

    def __init__(
        self,
        version: int,
        config: ModelConfig,
        session: Session,
        *,
        instances: int,
        warm_up: WarmUp,
        settings: ServerSettings,
        folder: Path,
    ) -> None:
        """Start to serve.

        Args:
            version: its number.
            config: what it takes and gives.
            session: the loaded graph; `close` closes it.
            instances: runs at once.
            warm_up: what was found when it was loaded.
            settings: the server's.
            folder: the model's, which holds sequences' initial states.

        Raises:
            ModelLoadError: the config's scheduling doesn't fit the graph.
        """
        self.name = config.name
        self.version = version
        self.config = config
        self.statistics = Statistics()
        self.memory_bytes = 0
        self.warm_up = warm_up
        self._session = session
        choice = choose_scheduler(config, instances, settings, warm_up)
        self.shares_runs = choice.shares_runs
        self._batching = choice.reason
        self._scheduler = choice.scheduler
        states = None
        if isinstance(self._scheduler, SequenceScheduler):
            states = ImplicitState(
                self._scheduler.settings, session.inputs, session.outputs, config.max_batch_size, folder
            )
        complete_scheduling(config.message, self._scheduler)
        self._runner = Runner(config, session, states)
        self._may_batch = config.max_batch_size > 0
        ordered = config.message.dynamic_batching.preserve_ordering
        self._ordered = OrderedAnswers() if ordered else None
        self._executor = Executor(
            f"{self.name}/{version}", instances, self._scheduler, self._answer, self._drop
        )

    @property
    def pending(self) -> int:
        """How many requests wait for an instance."""
        return self._executor.pending

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use."""
        return self._session.providers

    @property
    def placement(self) -> Mapping[str, int]:
        """How many of the graph's nodes run on each provider."""
        return self._session.placement.nodes

    @property
    def live_sequences(self) -> int:
        """How many sequences have a state here."""
        return self._scheduler.live if isinstance(self._scheduler, SequenceScheduler) else 0

    @property
    def properties(self) -> dict[str, str]:
        """What clients may want to know beside the config, for ModelMetadata."""
        return {
            "execution_providers": ",".join(self.providers),
            "batching": self._batching,
            **self._session.placement.properties(),
        }

    def submit(
        self,
        request: InferRequest,
        call: Call,
        *,
        inline: bool,
        emit: Callable[[InferResponse], None] | None = None,  # noqa: ARG002 - one answer, the future's
    ) -> Future[InferResponse]:
        """Check a request and have it run.

        Args:
            request: decoded, and meant for this version.
            call: its deadline and cancellation.
            inline: the caller will wait for the answer anyway, so its thread may run the graph.
            emit: would take the answers before the last; a graph answers once.

        Raises:
            InvalidArgumentError: the request doesn't fit the model.
            UnavailableError: the queue is full.
            RetiredError: the version takes no requests any more.
        """
        future: Future[InferResponse] = Future()
        queued = QueuedRequest(request, call, future)
        try:
            check_request(self.config, request)
            if self._may_batch:
                queued.rows, queued.shape = rows_and_shape(self.config, request.inputs)
        except InvalidArgumentError:
            self.statistics.record_failure("OTHER", call.received_ns)
            raise
        call.rows = queued.rows
        call.future = future
        if call.cancelled:  # before it had this future
            future.cancel()
        if self.config.encoded_image is not None:
            self._executor.reserve()
        if self._ordered is not None:
            self._ordered.expect(queued)
        if self.config.encoded_image is not None:
            call.leave_queue = partial(_forget_inputs, queued)
            decode_pool().submit(self._decode_and_enqueue, queued)
        else:
            self._enqueue(queued, inline=inline)
        return future

    def close(self) -> None:
        """Answer what waits, then give the threads and the graph back."""
        self._executor.close()
        self._session.close()

    def _enqueue(self, queued: QueuedRequest, *, inline: bool) -> None:
        queued.call.queued_ns = time.monotonic_ns()
        try:
            self._executor.submit(queued, inline=inline)
        except RetiredError:
            self._settle(queued, CanceledError("another version takes it"))
            raise
        except ServeError as error:
            self._settle(queued, error, "REJECTED" if isinstance(error, UnavailableError) else "OTHER")

    def _decode_and_enqueue(self, queued: QueuedRequest) -> None:
        """Decode the image files of a request, on a thread that is not the transport's, and go on."""
        encoded = self.config.encoded_image
        assert encoded is not None
        inputs = queued.request.inputs
        try:
            if queued.future.cancelled():
                self._settle(queued, CanceledError("the request was cancelled"), "CANCELED")
                return
            queued.request.inputs = encoded.decode_tensors(inputs)
            queued.shape = rows_and_shape(self.config, queued.request.inputs)[1] if self._may_batch else ()
            self._enqueue(queued, inline=False)
        except InvalidArgumentError as error:
            self._settle(queued, error, "OTHER")
        except Exception as error:  # noqa: BLE001 - a waiter must never be left without an answer
            self._settle(queued, InternalError(f"model '{self.name}': {error!r}"), "OTHER")
        finally:
            self._executor.unreserve()

    def _answer(self, batch: Sequence[QueuedRequest]) -> None:
        """Run a batch and settle each future, whatever happens."""
        live = [queued for queued in batch if self._is_live(queued)]
        if len(live) == 1:
            self._answer_alone(live[0])
        if len(live) <= 1:
            return
        try:
            answers = self._runner.run(live)
        except Exception as error:  # noqa: BLE001 - a waiter must never be left without an answer
            self._fail(live, error)
            return
        self.statistics.record_run(sum(queued.rows for queued in live), [queued.call for queued in live])
        for queued, outputs in zip(live, answers, strict=True):
            self._settle(queued, InferResponse(self.name, str(self.version), queued.request.id, outputs))

    def _is_live(self, queued: QueuedRequest) -> bool:
        """Whether a request is still wanted; else it is settled."""
        if queued.future.set_running_or_notify_cancel():
            return True
        self._settle(queued, CanceledError("the request was cancelled while it waited"), "CANCELED")
        return False

    def _fail(self, batch: Sequence[QueuedRequest], error: Exception) -> None:
        """Answer a run that failed; of several requests each is run again alone, for one may be at fault."""
        if len(batch) > 1:
            for queued in batch:
                self._answer_alone(queued)
            return
        if isinstance(error, CanceledError):
            self._settle(batch[0], error, "CANCELED")
        elif isinstance(error, InvalidArgumentError):
            self._settle(batch[0], error, "OTHER")
        elif isinstance(error, ServeError):
            self._settle(batch[0], error, "BACKEND")
        else:
            self._settle(batch[0], InternalError(f"model '{self.name}': {error!r}"), "BACKEND")

    def _answer_alone(self, queued: QueuedRequest) -> None:
        try:
            (outputs,) = self._runner.run([queued])
        except Exception as error:  # noqa: BLE001 - a waiter must never be left without an answer
            self._fail([queued], error)
            return
        self.statistics.record_run(queued.rows, [queued.call])
        self._settle(queued, InferResponse(self.name, str(self.version), queued.request.id, outputs))

    def _drop(self, queued: QueuedRequest, error: ServeError) -> None:
        self._settle(queued, error, "CANCELED" if isinstance(error, CanceledError) else "REJECTED")

    def _settle(
        self, queued: QueuedRequest, answer: InferResponse | ServeError, failure: str | None = None
    ) -> None:
        """Give a request its answer, in order of arrival where the config asks for it."""
        queued.call.leave_queue = None  # it refers to the request: a cycle would keep both until the next gc
        if failure is not None:
            self.statistics.record_failure(failure, queued.call.received_ns)
        if (
            queued.call.cancelled and queued.future.done()
        ):  # given up: nobody reads the answer, which may wait long for its turn
            queued.request.inputs = ()
            if not isinstance(answer, ServeError):
                answer = CanceledError("the request was cancelled while it ran")
        if self._ordered is None:
            give(queued.future, answer)
        else:
            self._ordered.give(queued, answer)


def _forget_inputs(queued: QueuedRequest) -> None:
    """Let go of the files of a request that was cancelled while it waits to be decoded."""
    queued.request.inputs = ()
