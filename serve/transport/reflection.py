"""gRPC server reflection, v1alpha and v1: what grpcurl and its kin ask before they call."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_METHOD = "ServerReflectionInfo"

MOST_REFLECTIONS = 4
"""Streams open at once; each holds a thread of the server for as long as its client likes."""


def add_reflection(server: grpc.Server, services: Iterable[str]) -> None:
    """Register both versions; they differ in their package's name alone, so one servicer answers both."""
    v1 = _describe_v1()
    servicer = reflection.ReflectionServicer((*services, reflection.SERVICE_NAME, v1))
    slots = threading.BoundedSemaphore(MOST_REFLECTIONS)

    def answers(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        if not slots.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.UNAVAILABLE, f"{MOST_REFLECTIONS} clients ask already: try again later"
            )
        try:
            yield from servicer.ServerReflectionInfo(requests, context)
        finally:
            slots.release()

    handler = grpc.stream_stream_rpc_method_handler(
        answers,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in (reflection.SERVICE_NAME, v1):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {_METHOD: handler}),))


def _describe_v1() -> str:
    """Put v1's descriptor into the pool, so that a client can ask for it; its service's full name."""
    name: str = reflection.SERVICE_NAME.replace("v1alpha", "v1")
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(name)
    except KeyError:
        described = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(described)
        text = text_format.MessageToString(described).replace("v1alpha", "v1")
        pool.Add(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()))
    return name
