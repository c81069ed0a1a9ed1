"""A name for a generation model under which it answers once, for clients that can't take a stream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, ModelLoadError, RetiredError, UnavailableError
from serve.generate.generation_config import GENERATION_MODEL, twin_of
from serve.generate.tensors import generation_model_config
from serve.generate.version import GenerationVersion
from serve.model.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from serve.model.model_config import ModelConfig
    from serve.model.served_version import ServedVersion
    from serve.pb import model_config_pb2 as pb
    from serve.request import Call, InferRequest, InferResponse

    Find = Callable[[str], ServedVersion | None]

logger = logging.getLogger(__name__)


class TwinVersion:
    """A `serve.model.served_version.ServedVersion` without a graph of its own.

    The generation model is looked up at each request, so that both may be loaded, reloaded and unloaded in
    any order. Requests count in this version's statistics, the engine's steps in the generation model's.

    Attributes:
        name, version: what it is.
        statistics: what it has answered so far.
        memory_bytes: none; the weights are the generation model's.
    """

    decoupled = False
    shares_runs = False
    pending = 0  # those that wait are in the generation model's queue
    live_sequences = 0

    def __init__(self, version: int, message: pb.ModelConfig, name: str, find: Find) -> None:
        """Start to serve.

        Args:
            version: its number.
            message: its config.pbtxt.
            name: the model's.
            find: the latest ready version of a model; None: there is none.

        Raises:
            ModelLoadError: it is its own generation model or that of another twin, or its config states
                tensors that a generation model doesn't have.
        """
        self.name = name
        self.version = version
        self.statistics = Statistics()
        self.memory_bytes = 0
        self._model = twin_of(message)
        self._find = find
        self._closed = False
        # Until it is known whether the generation model takes text.
        self._config = generation_model_config(message, name, has_tokenizer=True)
        self._message = message
        found = find(self._model)
        if found is None:
            logger.warning("'%s' answers with '%s', which is not loaded yet", name, self._model)
        if self._model == name or not (found is None or isinstance(found, GenerationVersion)):
            raise ModelLoadError(
                f"config.pbtxt: parameter '{GENERATION_MODEL}' is {self._model!r}, expected the name of a "
                "model that generates with a graph of its own"
            )

    @property
    def config(self) -> ModelConfig:
        """What it takes and gives: what the generation model does."""
        found = self._generating()
        if found is None or found.has_tokenizer:
            return self._config
        return generation_model_config(self._message, self.name, has_tokenizer=False)

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use."""
        found = self._generating()
        return () if found is None else found.providers

    @property
    def placement(self) -> Mapping[str, int]:
        """No nodes: the graph is another model's."""
        return {}

    @property
    def properties(self) -> dict[str, str]:
        """What clients may want to know beside the config, for ModelMetadata."""
        found = self._generating()
        return {GENERATION_MODEL: self._model, **({} if found is None else found.properties)}

    def submit(
        self,
        request: InferRequest,
        call: Call,
        *,
        inline: bool,  # noqa: ARG002 - see GenerationVersion
        emit: Callable[[InferResponse], None] | None = None,  # noqa: ARG002 - one answer, the future's
    ) -> Future[InferResponse]:
        """Have the generation model answer, once: see `GenerationVersion.submit`.

        Raises:
            InvalidArgumentError: the request doesn't fit the model, or the other model doesn't generate.
            UnavailableError: the generation model isn't loaded, or too many texts wait.
            RetiredError: one of the versions takes no requests any more.
        """
        if self._closed:
            raise RetiredError
        found = self._find(self._model)
        if found is None:
            self.statistics.record_failure("REJECTED", call.received_ns)
            raise UnavailableError(
                f"model '{self.name}' answers with generation model '{self._model}', which is not loaded: "
                "load it"
            )
        if not isinstance(found, GenerationVersion):
            self.statistics.record_failure("OTHER", call.received_ns)
            raise InvalidArgumentError(
                f"model '{self.name}' is to answer with '{self._model}', which is no model that generates "
                "with a graph of its own"
            )
        return found.generate(request, call, self, None)

    def close(self) -> None:
        """Take no more; the generation model completes what was begun."""
        self._closed = True

    def _generating(self) -> GenerationVersion | None:
        found = self._find(self._model)
        return found if isinstance(found, GenerationVersion) else None
