"""grpc.health.v1: the server's state under "" and its service name, each model's under the model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpc_health.v1.health_pb2 import HealthCheckResponse

from serve.rpc.servicer import SERVICE

if TYPE_CHECKING:
    from grpc_health.v1 import health

    from serve.core import InferenceCore


def publish(core: InferenceCore, servicer: health.HealthServicer) -> None:
    """Tell the health service what the core says of itself and of its models now."""
    states = dict.fromkeys(("", SERVICE), core.is_ready())
    states |= {model.name: bool(model.versions) for model in core.repository.models}
    for name, serving in states.items():
        servicer.set(name, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)
