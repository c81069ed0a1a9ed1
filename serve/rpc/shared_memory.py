"""Regions of shared memory: status, register, unregister; there is none on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, NotFoundError
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from serve.core import InferenceCore


def system_status(
    core: InferenceCore, request: pb.SystemSharedMemoryStatusRequest
) -> pb.SystemSharedMemoryStatusResponse:
    """The region of a name, or all of them."""
    response = pb.SystemSharedMemoryStatusResponse()
    for region in core.shared_memory.status(request.name):
        response.regions[region.name].MergeFrom(
            pb.SystemSharedMemoryStatusResponse.RegionStatus(
                name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
            )
        )
    return response


def system_register(
    core: InferenceCore, request: pb.SystemSharedMemoryRegisterRequest
) -> pb.SystemSharedMemoryRegisterResponse:
    """Name a part of a client's shared memory."""
    core.shared_memory.register(request.name, request.key, request.offset, request.byte_size)
    return pb.SystemSharedMemoryRegisterResponse()


def system_unregister(
    core: InferenceCore, request: pb.SystemSharedMemoryUnregisterRequest
) -> pb.SystemSharedMemoryUnregisterResponse:
    """Forget a region, or all of them; one that isn't there is forgotten already."""
    core.shared_memory.unregister(request.name)
    return pb.SystemSharedMemoryUnregisterResponse()


def cuda_status(
    _core: InferenceCore, request: pb.CudaSharedMemoryStatusRequest
) -> pb.CudaSharedMemoryStatusResponse:
    """None."""
    if request.name:
        raise NotFoundError(f"Unable to find cuda shared memory region: '{request.name}'")
    return pb.CudaSharedMemoryStatusResponse()


def cuda_register(
    _core: InferenceCore, request: pb.CudaSharedMemoryRegisterRequest
) -> pb.CudaSharedMemoryRegisterResponse:
    """Refuse it as a Triton without GPU support does."""
    raise InvalidArgumentError(
        f"failed to register CUDA shared memory region: '{request.name}', GPUs not supported: "
        "use system shared memory"
    )


def cuda_unregister(
    _core: InferenceCore, _request: pb.CudaSharedMemoryUnregisterRequest
) -> pb.CudaSharedMemoryUnregisterResponse:
    """There is nothing to forget, which is what the client wants."""
    return pb.CudaSharedMemoryUnregisterResponse()
