"""One loaded version of a generation model: check → schedule → run → sample → answer, many texts at once."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    InvalidArgumentError,
    ServeError,
    UnavailableError,
    UnsupportedError,
)
from serve.generate.engine import GenerationEngine
from serve.generate.generation_metrics import GenerationMetrics
from serve.generate.request_fields import RequestReader
from serve.generate.responses import Client, GenerationOutput
from serve.generate.sampling import sampler
from serve.generate.sequence import Sequence
from serve.model.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from serve.generate.runner import Runner
    from serve.generate.scheduler import GenerationScheduler
    from serve.generate.settings import GenerationSettings
    from serve.generate.tokenizer import Tokenizer
    from serve.model.model_config import ModelConfig
    from serve.model.served_version import ServedVersion
    from serve.request import Call, InferRequest, InferResponse
    from serve.runtime.session import Session

    Emit = Callable[[InferResponse], None]


class GenerationVersion:
    """A `serve.model.served_version.ServedVersion` that writes texts.

    Attributes:
        name, version, config: what it is.
        decoupled: whether it streams.
        settings: its limits.
        statistics: what it has answered so far.
        metrics: what its engine has done so far.
        memory_bytes: what loading it added to the process's memory.
    """

    shares_runs = False  # a request that is alone runs at once anyway, and on the engine's thread
    live_sequences = 0  # those of stateful models, which clients continue

    def __init__(
        self,
        version: int,
        config: ModelConfig,
        settings: GenerationSettings,
        *,
        session: Session,
        runner: Runner,
        scheduler: GenerationScheduler,
        tokenizer: Tokenizer | None,
        findings: tuple[str, ...] = (),
    ) -> None:
        """Start to serve; `close` closes the runner and the session.

        Args:
            version: its number.
            config: what clients send and get.
            settings: its limits.
            session: the loaded graph.
            runner: runs it.
            scheduler: decides what runs.
            tokenizer: None: clients send and get tokens' ids.
            findings: what makes it slower than it could be.
        """
        self.name = config.name
        self.version = version
        self.config = config
        self.settings = settings
        self.statistics = Statistics()
        self.metrics = GenerationMetrics(self.statistics)
        self.memory_bytes = 0
        self.decoupled = config.message.model_transaction_policy.decoupled
        self._session = session
        self._runner = runner
        self._tokenizer = tokenizer
        self._findings = findings
        self._engine = GenerationEngine(f"{self.name}/{version}", scheduler, runner, self.metrics)

    @property
    def has_tokenizer(self) -> bool:
        """Whether clients may send and get text."""
        return self._tokenizer is not None

    @property
    def pending(self) -> int:
        """How many requests wait for a place in the cache."""
        return self._engine.waiting

    @property
    def running(self) -> int:
        """How many have one."""
        return self._engine.running

    @property
    def cache_usage(self) -> float:
        """How much of the cache is in use, from 0 to 1."""
        return self._engine.cache_usage

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use."""
        return self._session.providers

    @property
    def placement(self) -> Mapping[str, int]:
        """How many of the graph's nodes run on each provider."""
        return self._session.placement.nodes

    @property
    def properties(self) -> dict[str, str]:
        """What clients may want to know beside the config, for ModelMetadata."""
        settings = self.settings
        return {
            "execution_providers": ",".join(self.providers),
            "batching": "; ".join((f"continuous, up to {settings.max_num_seqs} texts", *self._findings)),
            "context_length": str(settings.context_length),
            "max_prompt_length": str(settings.max_prompt_length),
            "max_num_seqs": str(settings.max_num_seqs),
            "kv_cache_tokens": str(settings.cache_tokens),
            "kv_cache_bytes_per_token": str(self._runner.bytes_per_token),
            "kv_cache_layout": "in place" if self._runner.adjacent_rows else "growing",
            **self._session.placement.properties(),
        }

    def submit(
        self,
        request: InferRequest,
        call: Call,
        *,
        inline: bool,  # noqa: ARG002 - a step runs many callers' texts, on the engine's thread
        emit: Emit | None = None,
    ) -> Future[InferResponse]:
        """Check a request and have its text generated.

        Args:
            request: decoded, and meant for this version.
            call: its deadline and cancellation.
            inline: without effect.
            emit: takes the answers before the last, where the model is decoupled.

        Raises:
            InvalidArgumentError: the request doesn't fit the model.
            UnsupportedError: the model is decoupled, and there is no `emit`.
            UnavailableError: too many texts wait.
            RetiredError: the version takes no requests any more.
        """
        if not self.decoupled:
            return self.generate(request, call, self, None)
        if emit is None:
            raise UnsupportedError("ModelInfer RPC doesn't support models with decoupled transaction policy")
        return self.generate(request, call, self, emit)

    def generate(
        self, request: InferRequest, call: Call, asked: ServedVersion, emit: Emit | None
    ) -> Future[InferResponse]:
        """Have a text generated for the version that was asked for it, this one or its twin: see `submit`."""
        statistics = asked.statistics
        reader = RequestReader(
            asked.name,
            self.settings,
            self._runner.vocabulary,
            self._tokenizer,
            streams=emit is not None,
        )
        try:
            wanted = reader.read(request)
        except ServeError:
            statistics.record_failure("OTHER", call.received_ns)
            raise
        future: Future[InferResponse] = Future()
        client = Client(asked.name, str(asked.version), request.id, future, emit)
        output = GenerationOutput(wanted, client, self._tokenizer, self.settings.eos_token_ids)
        sequence = Sequence(
            ids=list(wanted.prompt_ids),
            prompt_length=len(wanted.prompt_ids),
            max_tokens=wanted.max_tokens,
            call=call,
            sampler=sampler(wanted.sampling, self.settings.eos_token_ids),
            output=_Counted(output, call, statistics),
        )
        call.rows = 1
        call.future = future
        if call.cancelled:  # before it had this future
            future.cancel()
        call.queued_ns = time.monotonic_ns()
        try:
            self._engine.submit(sequence)
        except ServeError as error:
            statistics.record_failure(_reason(error, call), call.received_ns)
            raise
        return future

    def close(self) -> None:
        """Complete the texts that were begun, then give the thread, the cache and the graph back."""
        self._engine.close()
        self._runner.close()
        self._session.close()


class _Counted:
    """A sequence's output, counted in the statistics before its client hears of its end."""

    __slots__ = ("_call", "_output", "_statistics", "take")

    def __init__(self, output: GenerationOutput, call: Call, statistics: Statistics) -> None:
        self._output = output
        self._call = call
        self._statistics = statistics
        self.take = output.take

    def end(self, reason: str) -> None:
        call = self._call
        answer = self._output.last(reason)  # may fail; then nothing was answered
        call.ready_ns = call.started_ns
        call.ran_ns = call.done_ns = time.monotonic_ns()
        self._statistics.record_answer(call)
        self._output.give(answer)

    def fail(self, error: ServeError) -> None:
        self._statistics.record_failure(_reason(error, self._call), self._call.received_ns)
        self._output.fail(error)


def _reason(error: ServeError, call: Call) -> str:
    """Why a request failed, in Triton's words."""
    if isinstance(error, CanceledError):
        return "CANCELED"
    if isinstance(error, DeadlineExceededError):
        return "CANCELED" if call.started_ns else "REJECTED"
    if isinstance(error, UnavailableError):
        return "REJECTED"
    return "OTHER" if isinstance(error, InvalidArgumentError) else "BACKEND"
