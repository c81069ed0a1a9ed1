"""The inference core: what the server can do, whatever transport carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.admission import Admission
from serve.errors import RetiredError
from serve.observability.access_log import AccessLog
from serve.observability.log_settings import LogSettings
from serve.observability.observation import Observer
from serve.observability.tracing import Tracer
from serve.protocol.shared_memory import SharedMemory
from serve.rpc.stream import Streams

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from serve.model_repository.repository import Repository
    from serve.request import Call, InferRequest, InferResponse
    from serve.settings import ServerSettings


class InferenceCore:
    """Answers requests from a repository's models.

    Attributes:
        settings, repository: what it was made of.
        admission: how much may be inside at once.
        shared_memory: the regions that clients registered.
        streams: the open ModelStreamInfer streams.
        log, tracer, access_log, observer: what is written about requests.
    """

    def __init__(
        self, settings: ServerSettings, repository: Repository, log: LogSettings | None = None
    ) -> None:
        """Serve a repository; `log` is what the process's logging was configured with.

        Raises:
            SettingsError: the traces or the access log can't be written as the settings say.
        """
        self.settings = settings
        self.server_id = settings.server_id
        self.repository = repository
        self.admission = Admission(settings.max_inflight_requests, settings.max_inflight_bytes)
        self.shared_memory = SharedMemory(allow=settings.allow_client_shm, prefix=settings.client_shm_prefix)
        self.streams = Streams(settings.max_streams, settings.max_inflight_bytes)
        self.log = log or LogSettings(settings)
        self.tracer = Tracer(settings.trace_config)
        self.access_log = AccessLog(settings.access_log) if settings.access_log else None
        self.observer = Observer(self.tracer, self.access_log)

    def is_live(self) -> bool:
        """Whether the server can answer at all."""
        return True

    def is_ready(self) -> bool:
        """Whether to send requests here: not while stopping, and if strict, only with every model loaded."""
        if self.admission.closed:
            return False
        return not self.settings.strict_readiness or self.repository.all_ready()

    def infer(
        self,
        request: InferRequest,
        call: Call,
        *,
        inline: bool = False,
        emit: Callable[[InferResponse], None] | None = None,
    ) -> Future[InferResponse]:
        """Have a request answered.

        A decoupled model may answer several times: `emit` gets every answer but the last, from a thread that
        must not be kept waiting; the future's result is the last one.

        Args:
            request: the decoded request.
            call: its deadline and cancellation.
            inline: the calling thread will wait for the answer anyway and may run the graph itself.
            emit: takes a decoupled model's answers; None: the client can take one answer only.

        Raises:
            NotFoundError, UnavailableError, InvalidArgumentError: as the model and the request demand.
            UnsupportedError: a decoupled model, and no `emit`.
        """
        if request.shared_inputs or (
            request.outputs and any(output.shared_memory for output in request.outputs)
        ):
            self.shared_memory.resolve(request)
        while True:
            version = self.repository.get(request.model_name, request.model_version)
            try:
                # Where runs are shared, a request that isn't alone waits for those that are being decoded:
                # with 32 clients on one core that makes batches of 6 rows, running each at once 2.5.
                alone = not version.shares_runs or self.admission.inflight <= 1
                return version.submit(request, call, inline=inline and alone, emit=emit)
            except RetiredError:  # replaced since it was looked up
                continue

    def close(self) -> None:
        """Give models and memory back, after the last request."""
        self.repository.close()
        self.shared_memory.close()
