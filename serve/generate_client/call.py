"""Asking a generation model: whether it is one, how it answers, and the call itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from serve.client_connection import describe
from serve.generate_client.messages import GenerateError, is_generation_model
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class Connection:
    """A server, and how to call it.

    Attributes:
        stub: of GRPCInferenceService.
        options: as the connection's flags are parsed.
    """

    stub: Any
    options: argparse.Namespace

    @property
    def call(self) -> Mapping[str, Any]:
        """What goes with every RPC."""
        return {"timeout": self.options.timeout, "metadata": self.options.header}


def find_model(connection: Connection, name: str) -> pb.ModelMetadataResponse:
    """A generation model's metadata.

    Raises:
        GenerateError: there is no such model, or it is of another kind.
        grpc.RpcError: the server can't be reached, or refuses.
    """
    request = pb.ModelMetadataRequest(name=name, version=connection.options.version)
    try:
        metadata: pb.ModelMetadataResponse = connection.stub.ModelMetadata(request, **connection.call)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        message = describe(error, connection.options)
        raise GenerateError(message + _suggestion(connection, name)) from error
    if not is_generation_model(metadata):
        inputs = ", ".join(tensor.name for tensor in metadata.inputs)
        outputs = ", ".join(tensor.name for tensor in metadata.outputs)
        message = f"model '{name}' does not generate text, it answers {inputs} with {outputs}"
        raise GenerateError(message + _suggestion(connection, name))
    return metadata


def _suggestion(connection: Connection, name: str) -> str:
    near = f"{name}_generate"
    ready = connection.stub.ModelReady(pb.ModelReadyRequest(name=near), **connection.call).ready
    return f": did you mean '{near}'?" if ready else ""


def streams(connection: Connection, name: str) -> bool:
    """Whether a model answers piece by piece, which ModelStreamInfer alone carries.

    Raises:
        grpc.RpcError: the server can't be reached, or refuses.
    """
    request = pb.ModelConfigRequest(name=name, version=connection.options.version)
    try:
        config = connection.stub.ModelConfig(request, **connection.call).config
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:  # an extension of the protocol
            raise
        return False
    return bool(config.model_transaction_policy.decoupled)


def ask(
    connection: Connection, request: pb.ModelInferRequest, *, stream: bool
) -> Iterator[pb.ModelInferResponse]:
    """The responses to a request, as they come; whoever stops reading them cancels the request.

    Raises:
        GenerateError: the server refused the request, or the model failed.
        grpc.RpcError: the same, or the connection broke.
    """
    if not stream:
        yield connection.stub.ModelInfer(request, **connection.call)
        return
    responses = connection.stub.ModelStreamInfer(iter([request]), **connection.call)
    try:
        for message in responses:
            if message.error_message:
                raise GenerateError(" ".join(message.error_message.split()))
            yield message.infer_response
    finally:
        responses.cancel()
