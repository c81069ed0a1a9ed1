"""What the server needs of a model version that answers requests, whatever answers them behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from serve.model.model_config import ModelConfig
    from serve.model.statistics import Statistics
    from serve.request import Call, InferRequest, InferResponse


class ServedVersion(Protocol):
    """A graph that is run once for each request, one that generates, or a name for another version.

    Attributes:
        memory_bytes: what loading it added to the process's memory.
    """

    memory_bytes: int

    @property
    def name(self) -> str:
        """The model's."""

    @property
    def version(self) -> int:
        """Its number."""

    @property
    def config(self) -> ModelConfig:
        """What it takes and gives."""

    @property
    def statistics(self) -> Statistics:
        """What it has answered so far."""

    @property
    def decoupled(self) -> bool:
        """Whether it may answer a request several times."""

    @property
    def shares_runs(self) -> bool:
        """Whether several requests may be answered by one run that waits for them."""

    @property
    def pending(self) -> int:
        """How many requests wait."""

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use."""

    @property
    def placement(self) -> Mapping[str, int]:
        """How many of the graph's nodes run on each provider."""

    @property
    def live_sequences(self) -> int:
        """How many sequences have a state here."""

    @property
    def properties(self) -> dict[str, str]:
        """What clients may want to know beside the config, for ModelMetadata."""

    def submit(
        self,
        request: InferRequest,
        call: Call,
        *,
        inline: bool,
        emit: Callable[[InferResponse], None] | None = None,
    ) -> Future[InferResponse]:
        """Check a request and have it answered: see `serve.model.version.ModelVersion`.

        Raises:
            InvalidArgumentError: the request doesn't fit the model.
            UnsupportedError: a decoupled model, and no `emit`.
            UnavailableError: the queue is full.
            RetiredError: the version takes no requests any more.
        """

    def close(self) -> None:
        """Answer what it has, then give everything back."""
