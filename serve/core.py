"""The inference core: what the server can do, whatever transport carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.admission import Admission

if TYPE_CHECKING:
    from concurrent.futures import Future

    from serve.repository import Repository
    from serve.request import Call, InferRequest, InferResponse
    from serve.settings import ServerSettings


class InferenceCore:
    """Answers requests from a repository's models."""

    def __init__(self, settings: ServerSettings, repository: Repository) -> None:
        self.server_id = settings.server_id
        self.repository = repository
        self.admission = Admission(settings.max_inflight_requests)
        self._strict_readiness = settings.strict_readiness

    def is_live(self) -> bool:
        """Whether the server can answer at all."""
        return True

    def is_ready(self) -> bool:
        """Whether to send requests here: not while stopping, and if strict, only with every model loaded."""
        if self.admission.closed:
            return False
        return not self._strict_readiness or all(model.ready for model in self.repository.models)

    def infer(self, request: InferRequest, call: Call, *, inline: bool = False) -> Future[InferResponse]:
        """Have a request answered.

        Args:
            request: the decoded request.
            call: its deadline and cancellation.
            inline: the calling thread will wait for the answer anyway and may run the graph itself.

        Raises:
            NotFoundError, UnavailableError, InvalidArgumentError: as the model and the request demand.
        """
        version = self.repository.get(request.model_name, request.model_version)
        return version.submit(request, call, inline=inline)
