"""Clients in threads that send one request after the other and write down what became of each."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
CLIENTS = 6
# As gRPC's own retries do: who is refused doesn't come again at once.
_BACK_OFF_SECONDS = 0.02
_MULTIPLICATIONS = (1, 10, 50, 200)


@dataclass
class Outcomes:
    """What became of the requests: ids of those that were answered, status and message of the others."""

    answered: set[str] = field(default_factory=set)
    refused: list[tuple[str, str]] = field(default_factory=list)
    health_at_refusal: set[str] = field(default_factory=set)


def slow_request(multiplications: int, identifier: str = "") -> pb.ModelInferRequest:
    """Of the model `slow`: about 0.1 ms for each multiplication."""
    content = np.array(multiplications, np.int64).tobytes()
    message = pb.ModelInferRequest(model_name="slow", id=identifier, raw_input_contents=[content])
    message.inputs.add(name="n", datatype="INT64", shape=[])
    return message


def large_request(identifier: str) -> pb.ModelInferRequest:
    """Of the model `echo`: 1 MB that comes back."""
    x = np.zeros((1, 250_000), np.float32)
    message = pb.ModelInferRequest(model_name="echo", id=identifier, raw_input_contents=[x.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return message


class ClosedLoop:
    """Six clients, each with a connection of its own, until the server is gone or `stop`."""

    def __init__(self, url: str) -> None:
        self.outcomes = Outcomes()
        self._url = url
        self._gone = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int) -> None:
        """Return when so many requests were answered."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.outcomes.answered) >= count, 60)

    def stop(self) -> Outcomes:
        """End the clients after the request that each has sent."""
        self._gone.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request was neither answered nor refused"
        return self.outcomes

    def _run(self, number: int) -> None:
        with grpc.insecure_channel(self._url, OWN_CONNECTION) as channel:
            stub: Any = GRPCInferenceServiceStub(channel)
            for turn in itertools.count():
                if self._gone.is_set():
                    return
                name = f"{number}-{turn}"
                multiplications = _MULTIPLICATIONS[(number + turn) % len(_MULTIPLICATIONS)]
                message = slow_request(multiplications, name) if number else large_request(name)
                try:
                    answer = stub.ModelInfer(message, timeout=60)
                except grpc.RpcError as error:
                    self._refused(channel, error)
                    time.sleep(_BACK_OFF_SECONDS)
                else:
                    assert answer.id == name
                    with self._changed:
                        self.outcomes.answered.add(name)
                        self._changed.notify_all()

    def _refused(self, channel: grpc.Channel, error: Any) -> None:
        self.outcomes.refused.append((error.code().name, error.details()))
        if "shutting down" in error.details():
            self.outcomes.health_at_refusal.add(health(channel))


def health(channel: grpc.Channel) -> str:
    """What the health service says of the server; UNAVAILABLE if it isn't there any more."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status
    except grpc.RpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
