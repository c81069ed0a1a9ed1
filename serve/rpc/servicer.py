"""The protocol as a table: method name → (parse, handle, serialize), functions over bytes.

A transport looks a method up, and answers with `serialize(handle(core, parse(data), call).result())`. Nothing
here knows which transport that is.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.pb import grpc_service_pb2 as pb
from serve.protocol import codec
from serve.rpc import diagnostics, models, repository, shared_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from serve.core import InferenceCore
    from serve.request import Call, InferRequest, InferResponse

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE: str = _DESCRIPTOR.full_name
RPCS = tuple(method.name for method in _DESCRIPTOR.methods)
"""All methods of the protocol: those of `METHODS`, and the one that is a stream."""
STREAM = "ModelStreamInfer"
"""Answered by `serve.rpc.stream`."""
LARGEST = 1 << 20
"""Bytes of a request of most RPCs, whose real ones have hundreds."""
UNLIMITED = sys.maxsize
"""`largest` of a method that only the transport's limit bounds."""


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    Attributes:
        parse: request bytes to what `handle` takes; raises InvalidArgumentError.
        handle: (core, parsed request, call) to a future; raises ServeErrors, as may the future.
        serialize: the future's result to response bytes.
        counted: whether it is work that the in-flight limit bounds and a stopping server waits for.
        largest: bytes that a request may have.
        check: refuses a request, by ServeErrors, before it is parsed; None: there is nothing to check.
    """

    parse: Callable[[bytes], Any]
    handle: Callable[[InferenceCore, Any, Call], Future[Any]]
    serialize: Callable[[Any], bytes]
    counted: bool = False
    largest: int = LARGEST
    check: Callable[[InferenceCore], None] | None = None

    def admits(self, size: int) -> bool:
        """Whether a request of `size` bytes counts in admission.

        Those of `counted` methods, and those whose bytes matter: a model that is loaded from its request.
        Other loads don't, so an overloaded server can still be given another model, and one that stops
        refuses them without waiting.
        """
        return self.counted or size > LARGEST


def _model_infer(core: InferenceCore, request: InferRequest, call: Call) -> Future[InferResponse]:
    # Every transport so far has a thread that waits for this answer, so the graph may run on it.
    return core.infer(request, call, inline=True)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _immediate(request_type: type[Any], handle: Callable[[InferenceCore, Any], Any]) -> Method:
    """A method that is answered without waiting for anything."""
    return Method(codec.parse(request_type), _now(handle), _serialize)


def _now(handle: Callable[[InferenceCore, Any], Any]) -> Callable[[InferenceCore, Any, Call], Future[Any]]:
    def handle_now(core: InferenceCore, request: Any, _call: Call) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(handle(core, request))
        return future

    return handle_now


def _check_explicit(core: InferenceCore) -> None:
    """Refuse a load that is refused whatever it says, so that nothing of it need be in memory."""
    if core.settings.model_control_mode != "explicit":
        repository.model_load(core, pb.RepositoryModelLoadRequest())  # names the reason


METHODS: dict[str, Method] = {
    "ServerLive": _immediate(pb.ServerLiveRequest, models.server_live),
    "ServerReady": _immediate(pb.ServerReadyRequest, models.server_ready),
    "ModelReady": _immediate(pb.ModelReadyRequest, models.model_ready),
    "ServerMetadata": _immediate(pb.ServerMetadataRequest, models.server_metadata),
    "ModelMetadata": _immediate(pb.ModelMetadataRequest, models.model_metadata),
    "ModelConfig": _immediate(pb.ModelConfigRequest, models.model_config),
    "ModelStatistics": _immediate(pb.ModelStatisticsRequest, models.model_statistics),
    "RepositoryIndex": _immediate(pb.RepositoryIndexRequest, repository.repository_index),
    "SystemSharedMemoryStatus": _immediate(pb.SystemSharedMemoryStatusRequest, shared_memory.system_status),
    "SystemSharedMemoryRegister": _immediate(
        pb.SystemSharedMemoryRegisterRequest, shared_memory.system_register
    ),
    "SystemSharedMemoryUnregister": _immediate(
        pb.SystemSharedMemoryUnregisterRequest, shared_memory.system_unregister
    ),
    "CudaSharedMemoryStatus": _immediate(pb.CudaSharedMemoryStatusRequest, shared_memory.cuda_status),
    "CudaSharedMemoryRegister": _immediate(pb.CudaSharedMemoryRegisterRequest, shared_memory.cuda_register),
    "CudaSharedMemoryUnregister": _immediate(
        pb.CudaSharedMemoryUnregisterRequest, shared_memory.cuda_unregister
    ),
    "TraceSetting": _immediate(pb.TraceSettingRequest, diagnostics.trace_setting),
    "LogSettings": _immediate(pb.LogSettingsRequest, diagnostics.log_settings),
    # It brings a model's files along.
    "RepositoryModelLoad": Method(
        codec.parse_bounded(pb.RepositoryModelLoadRequest),
        _now(repository.model_load),
        _serialize,
        largest=UNLIMITED,
        check=_check_explicit,
    ),
    "RepositoryModelUnload": _immediate(pb.RepositoryModelUnloadRequest, repository.model_unload),
    "ModelInfer": Method(
        codec.decode_infer_request,
        _model_infer,
        codec.encode_infer_response,
        counted=True,
        largest=UNLIMITED,
    ),
}
