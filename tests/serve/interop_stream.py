"""Streams and shared memory as tritonclient sees them, as JSON. A process of its own, like its neighbour.

Usage: python interop_stream.py HOST:PORT streams|shared_memory
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

LONG = 1_000_000
KEY = f"/onnxedge_interop_{os.getpid()}"


def tensor(name: str, array: np.ndarray, datatype: str) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def scaled(value: float) -> Any:
    return tensor("x", np.full((1, 4), value, np.float32), "FP32")


def slow(count: int) -> Any:
    return tensor("n", np.array(count, np.int64).reshape(()), "INT64")


def gather(index: int) -> Any:
    return tensor("x", np.array([index], np.int64), "INT64")


REQUESTS = (
    {"model_name": "slow", "inputs": [slow(200)], "request_id": "a"},
    {"model_name": "versions", "inputs": [scaled(1)], "request_id": "b", "enable_empty_final_response": True},
    {"model_name": "nowhere", "inputs": [scaled(1)], "request_id": "c"},
    {"model_name": "gather", "inputs": [gather(9)], "request_id": "d"},
    {"model_name": "versions", "inputs": [scaled(2)], "request_id": "e", "model_version": "1"},
    {"model_name": "versions", "inputs": [scaled(3)], "request_id": "f", "sequence_id": 7},
)


def outcome(result: Any, error: Any) -> Any:
    """An answer as id, first value and parameters, or an error as its status and text."""
    if error is not None:
        return [str(error.status()), str(error.message())]
    response = result.get_response()
    parameters = {name: value.bool_param for name, value in response.parameters.items()}
    return [response.id, float(result.as_numpy("y").flat[0]), parameters]


def refusal(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def stream(client: Any, *requests: dict[str, Any], answers: int, **options: Any) -> list[Any]:
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put(outcome(result, error)), **options)
    for request in requests:
        client.async_stream_infer(**request)
    got = [done.get(timeout=60) for _ in range(answers)]
    client.stop_stream()
    return [*got, *(done.get_nowait() for _ in range(done.qsize()))]


def cancelled(client: Any) -> list[Any]:
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put(outcome(result, error)))
    for _ in range(4):
        client.async_stream_infer("slow", [slow(LONG)])
    client.stop_stream(cancel_requests=True)
    return [done.get(timeout=60)[0], outcome(client.infer("versions", [scaled(4)]), None)[1]]


async def aio_stream(url: str) -> list[Any]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for request in REQUESTS:
            yield dict(request)

    async with triton_aio.InferenceServerClient(url) as client:
        return [outcome(*answer) async for answer in client.stream_infer(requests())]


def streams(client: Any, url: str) -> dict[str, Any]:
    return {
        "sync": stream(client, *REQUESTS, answers=len(REQUESTS)),
        "aio": asyncio.run(aio_stream(url)),
        "many": stream(
            client, *({"model_name": "versions", "inputs": [scaled(i)]} for i in range(300)), answers=300
        ),
        "status": stream(
            client, *REQUESTS[1:4], REQUESTS[5], answers=3, headers={"triton_grpc_error": "true"}
        ),
        "late": stream(client, {"model_name": "slow", "inputs": [slow(LONG)]}, answers=1, stream_timeout=0.3),
        "cancelled": cancelled(client),
    }


def shared_inputs(offset: int) -> list[Any]:
    inputs = [triton.InferInput(name, [2, 3], "FP32") for name in ("a", "b")]
    inputs[0].set_shared_memory("input", 24)
    inputs[1].set_shared_memory("input", 24, offset)
    return inputs


def shared_output(name: str, byte_size: int, offset: int = 0, region: str = "output") -> Any:
    output = triton.InferRequestedOutput(name)
    output.set_shared_memory(region, byte_size, offset)
    return output


def shared_text(client: Any, handle: Any) -> Any:
    """Text from shared memory and back to it."""
    texts = np.array([["héé".encode(), b""]], object)
    data = serialize_byte_tensor(texts)
    shm.set_shared_memory_region(handle, [data], 100)
    given = triton.InferInput("x", [1, 2], "BYTES")
    given.set_shared_memory("input", len(data.item()), 100)
    result = client.infer("identity_bytes", [given], outputs=[shared_output("y", 40)])
    return [shm.get_contents_as_numpy(handle, np.object_, [1, 2], 272).tolist() == texts.tolist(),
            len(result.get_response().raw_output_contents[0])]  # fmt: skip


def shared_memory(client: Any) -> dict[str, Any]:
    handle = shm.create_shared_memory_region("all", KEY, 512)
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
    shm.set_shared_memory_region(handle, [a, b])
    register = client.register_system_shared_memory
    try:
        seen: dict[str, Any] = {"none": client.get_system_shared_memory_status(as_json=True)}
        register("input", KEY, 256)
        register("output", KEY, 200, offset=272)
        seen["all"] = client.get_system_shared_memory_status(as_json=True)["regions"]
        seen["one"] = client.get_system_shared_memory_status("output", as_json=True)["regions"]
        outputs = [shared_output("sum", 24), shared_output("difference", 30, 64)]
        result = client.infer("batched", shared_inputs(24), outputs=outputs)
        seen["response"] = result.get_response(as_json=True)
        seen["sum"] = shm.get_contents_as_numpy(handle, np.float32, [2, 3], 272).tolist()
        seen["difference"] = shm.get_contents_as_numpy(handle, np.float32, [2, 3], 336).tolist()
        mixed = [shared_inputs(24)[0], tensor("b", b, "FP32")]
        seen["mixed"] = client.infer("batched", mixed).as_numpy("sum").tolist()
        seen["text"] = shared_text(client, handle)
        small = [shared_output("sum", 20)]
        seen["refused"] = {
            "registered again": refusal(lambda: register("input", KEY, 24)),
            "no such file": refusal(lambda: register("x", KEY + "_not", 24)),
            "another's file": refusal(lambda: register("x", "/dev_null", 24)),
            "past the file's end": refusal(lambda: register("x", KEY, 4096, offset=4096)),
            "unknown status": refusal(lambda: client.get_system_shared_memory_status("x")),
            "unknown region": refusal(
                lambda: client.infer("batched", mixed, outputs=[shared_output("sum", 24, region="x")])
            ),
            "past the region's end": refusal(lambda: client.infer("batched", shared_inputs(240))),
            "output too small": refusal(lambda: client.infer("batched", mixed, outputs=small)),
            "unregister unknown": refusal(lambda: client.unregister_system_shared_memory("x")),
            "cuda status": refusal(client.get_cuda_shared_memory_status),
            "cuda unknown": refusal(lambda: client.get_cuda_shared_memory_status("x")),
            "cuda register": refusal(lambda: client.register_cuda_shared_memory("x", b"aGFuZGxl", 0, 24)),
            "cuda unregister": refusal(client.unregister_cuda_shared_memory),
        }
        client.unregister_system_shared_memory("input")
        seen["unregistered"] = refusal(lambda: client.infer("batched", shared_inputs(24)))
        client.unregister_system_shared_memory()
        seen["left"] = client.get_system_shared_memory_status(as_json=True)
    finally:
        shm.destroy_shared_memory_region(handle)
    return seen


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as connected:
        if sys.argv[2] == "streams":
            print(json.dumps(streams(connected, sys.argv[1])))
        else:
            print(json.dumps(shared_memory(connected)))
