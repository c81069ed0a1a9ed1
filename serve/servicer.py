"""The protocol as a table: method name → (parse, handle, serialize), functions over bytes.

A transport looks a method up, and answers with `serialize(handle(core, parse(data), call).result())`. Nothing
here knows which transport that is.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve import __version__, codec
from serve.config_pbtxt import PLATFORM
from serve.errors import InvalidArgumentError, UnsupportedError
from serve.pb import grpc_service_pb2 as pb
from serve.statistics import statistics_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from serve.core import InferenceCore
    from serve.model_config import TensorSpec
    from serve.request import Call, InferRequest, InferResponse

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE: str = _DESCRIPTOR.full_name
RPCS = tuple(method.name for method in _DESCRIPTOR.methods)
"""All methods of the protocol, also those that are not in `METHODS`."""

# What is implemented of Triton's list, by its names.
EXTENSIONS = ("classification", "binary_tensor_data", "model_configuration", "statistics")


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    Attributes:
        parse: request bytes to what `handle` takes; raises InvalidArgumentError.
        handle: (core, parsed request, call) to a future; raises ServeErrors, as may the future.
        serialize: the future's result to response bytes.
        counted: whether it is work that the in-flight limit bounds and a stopping server waits for.
    """

    parse: Callable[[bytes], Any]
    handle: Callable[[InferenceCore, Any, Call], Future[Any]]
    serialize: Callable[[Any], bytes]
    counted: bool = False


def _server_live(core: InferenceCore, _request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
    return pb.ServerLiveResponse(live=core.is_live())


def _server_ready(core: InferenceCore, _request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
    return pb.ServerReadyResponse(ready=core.is_ready())


def _model_ready(core: InferenceCore, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
    ready = core.repository.is_ready(request.name, request.version) and not core.admission.closed
    return pb.ModelReadyResponse(ready=ready)


def _server_metadata(core: InferenceCore, _request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name=core.server_id, version=__version__, extensions=EXTENSIONS)


def _model_metadata(core: InferenceCore, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
    version = core.repository.get(request.name, request.version)
    return pb.ModelMetadataResponse(
        name=version.name,
        versions=[str(found.version) for found in core.repository.find(version.name)],
        platform=PLATFORM,
        inputs=_tensor_metadata(version.config.inputs.values()),
        outputs=_tensor_metadata(version.config.outputs.values()),
        properties={"execution_providers": ",".join(version.providers)},
    )


def _tensor_metadata(specs: Iterable[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype.name, shape=spec.shape)
        for spec in specs
    ]


def _model_config(core: InferenceCore, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
    return pb.ModelConfigResponse(config=core.repository.get(request.name, request.version).config.message)


def _repository_index(core: InferenceCore, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
    if request.repository_name:
        raise UnsupportedError("'repository_name' specification is not supported")
    response = pb.RepositoryIndexResponse()
    for model in core.repository.models:
        for number in sorted(model.versions):
            response.models.add(name=model.name, version=str(number), state="READY")
        if request.ready:
            continue
        for problem, reason in model.problems.items():
            response.models.add(
                name=model.name, version=str(problem or ""), state="UNAVAILABLE", reason=reason
            )
    return response


def _model_statistics(core: InferenceCore, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
    found = core.repository.find(request.name, request.version)
    if request.name and not found:
        raise InvalidArgumentError(f"requested model '{request.name}' is not available")
    return pb.ModelStatisticsResponse(
        model_stats=[
            statistics_message(version.name, version.version, version.statistics.snapshot())
            for version in found
        ]
    )


def _model_infer(core: InferenceCore, request: InferRequest, call: Call) -> Future[InferResponse]:
    # Every transport so far has a thread that waits for this answer, so the graph may run on it.
    return core.infer(request, call, inline=True)


def _immediate(request_type: type[Any], handle: Callable[[InferenceCore, Any], Any]) -> Method:
    """A method that is answered without waiting for anything."""

    def handle_now(core: InferenceCore, request: Any, _call: Call) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(handle(core, request))
        return future

    return Method(codec.parse(request_type), handle_now, lambda message: message.SerializeToString())


METHODS: dict[str, Method] = {
    "ServerLive": _immediate(pb.ServerLiveRequest, _server_live),
    "ServerReady": _immediate(pb.ServerReadyRequest, _server_ready),
    "ModelReady": _immediate(pb.ModelReadyRequest, _model_ready),
    "ServerMetadata": _immediate(pb.ServerMetadataRequest, _server_metadata),
    "ModelMetadata": _immediate(pb.ModelMetadataRequest, _model_metadata),
    "ModelConfig": _immediate(pb.ModelConfigRequest, _model_config),
    "ModelStatistics": _immediate(pb.ModelStatisticsRequest, _model_statistics),
    "RepositoryIndex": _immediate(pb.RepositoryIndexRequest, _repository_index),
    "ModelInfer": Method(codec.decode_infer_request, _model_infer, codec.encode_infer_response, counted=True),
}
