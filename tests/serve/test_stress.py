"""Clients that cancel and run out of time at random: nobody gets another's answer, nothing stays behind."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer

CLIENTS = 12
REQUESTS = 60


def request(model: str, name: str, datatype: str, array: np.ndarray) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
    message.inputs.add(name=name, datatype=datatype, shape=array.shape)
    return message


def client(url: str, seed: int) -> int:
    """Send one client's requests; how many of the quick ones were answered, each with its own numbers."""
    draw = random.Random(seed)  # noqa: S311 - not a secret
    right = 0
    with grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        for _ in range(REQUESTS):
            if draw.random() < 0.5:
                x = np.full((1, 4), draw.random(), np.float32)
                answer = stub.ModelInfer(request("versions", "x", "FP32", x), timeout=60)
                right += answer.raw_output_contents[0] == (2 * x).tobytes()
                continue
            multiplications = np.array(draw.choice([1, 10, 1000]), np.int64)
            message = request("slow", "n", "INT64", multiplications)
            future = stub.ModelInfer.future(message, timeout=draw.choice([0.001, 0.02, 60]))
            if draw.random() < 0.4:
                future.cancel()
            elif error := future.exception():
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return right


def test_random_cancels_and_deadlines_leave_nothing_behind(
    serve: Callable[..., RunningServer], repository: Path
) -> None:
    server = serve("--model-repository", repository)
    with ThreadPoolExecutor(CLIENTS) as pool:
        right = sum(pool.map(lambda seed: client(server.url, seed), range(CLIENTS)))
    assert f'nv_inference_request_success{{model="versions",version="2"}} {right}\n' in server.metrics()
    assert right > CLIENTS * REQUESTS / 3
    # A request that never left would hold the drain for 30 s and make this 1.
    assert server.stop() == 0
