"""The model repository: index, load, unload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from serve.model_repository.overrides import parse_override
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from serve.core import InferenceCore

_REFUSALS = {
    "poll": "explicit model load / unload is not allowed if polling is enabled",
    "none": "explicit model load / unload is not allowed when model control mode is not explicit",
}


def repository_index(core: InferenceCore, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
    """Every model of the repository with its versions' states."""
    if request.repository_name:
        raise _no_repository_name()
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponse.ModelIndex(
                name=found.name, version=found.version, state=found.state, reason=found.reason
            )
            for found in core.repository.index(ready=request.ready)
        ]
    )


def model_load(core: InferenceCore, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
    """Load or reload a model, from its folder or from what comes with the request."""
    name = _model_name(core, request)
    core.repository.load_model(name, parse_override(request.parameters))
    return pb.RepositoryModelLoadResponse.FromString(_done(name))


def model_unload(
    core: InferenceCore, request: pb.RepositoryModelUnloadRequest
) -> pb.RepositoryModelUnloadResponse:
    """Take a model out of service alone, whatever `unload_dependents` says.

    A twin of a generation model stays, and answers UNAVAILABLE until that is loaded again.
    """
    name = _model_name(core, request)
    dependents = request.parameters.get("unload_dependents")
    if dependents is not None and dependents.WhichOneof("parameter_choice") != "bool_param":
        raise InvalidArgumentError(
            "invalid value type for 'unload_dependents' parameter, expected bool_param"
        )
    core.repository.unload_model(name)
    return pb.RepositoryModelUnloadResponse.FromString(_done(name))


def _model_name(
    core: InferenceCore, request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest
) -> str:
    """The model that a request is about, once it is known that requests may load and unload.

    KServe's own messages have the model's name in field 1, where Triton's have the repository's.

    Raises:
        UnavailableError: the control mode is another, or the server stops.
        UnsupportedError: a repository is named.
    """
    mode = core.settings.model_control_mode
    if mode in _REFUSALS:
        raise UnavailableError(_REFUSALS[mode])
    if core.admission.closed:
        raise UnavailableError("the server is stopping")
    if not request.repository_name:
        return request.model_name
    if request.model_name or not core.repository.knows(request.repository_name):
        raise _no_repository_name()
    return request.repository_name


def _done(name: str) -> bytes:
    """A response as KServe's clients expect it, {1: model name, 2: true}; Triton's skip unknown fields.

    RepositoryIndexRequest has fields of these numbers and types, so protobuf writes them for us.
    """
    return pb.RepositoryIndexRequest(repository_name=name, ready=True).SerializeToString()


def _no_repository_name() -> UnsupportedError:
    return UnsupportedError("'repository_name' specification is not supported")
