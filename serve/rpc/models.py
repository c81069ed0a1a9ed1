"""The server and its models: live, ready, metadata, config, statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve import __version__
from serve.errors import InvalidArgumentError
from serve.model.config_pbtxt import PLATFORM
from serve.model.statistics import statistics_message
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serve.core import InferenceCore
    from serve.model.model_config import TensorSpec

# What is implemented of Triton's list, by its names.
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


def server_live(core: InferenceCore, _request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
    """Whether the server can answer at all."""
    return pb.ServerLiveResponse(live=core.is_live())


def server_ready(core: InferenceCore, _request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
    """Whether to send requests here."""
    return pb.ServerReadyResponse(ready=core.is_ready())


def model_ready(core: InferenceCore, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
    """Whether a model version answers; false, not an error, where there is none."""
    ready = core.repository.is_ready(request.name, request.version) and not core.admission.closed
    return pb.ModelReadyResponse(ready=ready)


def server_metadata(core: InferenceCore, _request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
    """Name, version and the extensions that there are."""
    return pb.ServerMetadataResponse(name=core.server_id, version=__version__, extensions=EXTENSIONS)


def model_metadata(core: InferenceCore, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
    """A model version's tensors, as clients see them, and what it runs on."""
    version = core.repository.get(request.name, request.version)
    return pb.ModelMetadataResponse(
        name=version.name,
        versions=[str(found.version) for found in core.repository.find(version.name, request.version)],
        platform=PLATFORM,
        inputs=_tensor_metadata(version.config.inputs.values()),
        outputs=_tensor_metadata(version.config.outputs.values()),
        properties=version.properties,
    )


def _tensor_metadata(specs: Iterable[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype.name, shape=spec.shape)
        for spec in specs
    ]


def model_config(core: InferenceCore, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
    """A model version's config.pbtxt, completed."""
    return pb.ModelConfigResponse(config=core.repository.get(request.name, request.version).config.message)


def model_statistics(core: InferenceCore, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
    """Counts and durations of one version, of all of a model, or of all there are."""
    found = core.repository.find(request.name, request.version if request.name else "")
    if request.name and not found:
        raise InvalidArgumentError(f"requested model '{request.name}' is not available")
    return pb.ModelStatisticsResponse(
        model_stats=[
            statistics_message(version.name, version.version, version.statistics.snapshot())
            for version in found
        ]
    )
