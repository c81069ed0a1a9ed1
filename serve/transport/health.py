"""grpc.health.v1: the server's state under "" and its service name, each model's under the model's name.

Under its own name health says whether the process answers at all, whatever became of the models: what would
restart a server (a liveness probe of Kubernetes) asks for that, for a new start mends no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse

from serve.rpc.servicer import SERVICE

if TYPE_CHECKING:
    from serve.core import InferenceCore


def publish(core: InferenceCore, servicer: health.HealthServicer) -> None:
    """Tell the health service what the core says of itself and of its models now."""
    states = dict.fromkeys(("", SERVICE), core.is_ready())
    states[health.SERVICE_NAME] = core.is_live()
    states |= {model.name: bool(model.versions) for model in core.repository.models}
    for name, serving in states.items():
        servicer.set(name, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)
