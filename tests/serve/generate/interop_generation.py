"""Generation as tritonclient sees it, as JSON. A process of its own: its stubs and ours can't share one.

Usage: python interop_generation.py HOST:PORT everything|forever
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROMPT = "Once upon a time"
FOREVER = 8000


def tensor(name: str, values: list[Any], datatype: str, dtype: Any) -> Any:
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, dtype))
    return made


def text_inputs(tokens: int, *, stream: bool = True) -> list[Any]:
    return [
        tensor("text_input", [PROMPT.encode()], "BYTES", object),
        tensor("max_tokens", [tokens], "INT32", np.int32),
        tensor("temperature", [0.0], "FP32", np.float32),
        tensor("stream", [stream], "BOOL", np.bool_),
        tensor("exclude_input_in_output", [True], "BOOL", np.bool_),
    ]


def id_inputs(tokens: int) -> list[Any]:
    return [
        tensor("input_ids", [1, 2, 3], "INT64", np.int64),
        tensor("max_tokens", [tokens], "INT32", np.int32),
        tensor("temperature", [0.0], "FP32", np.float32),
        tensor("stream", [True], "BOOL", np.bool_),
    ]


def outcome(result: Any, error: Any) -> dict[str, Any]:
    if error is not None:
        return {"error": str(error.message())}
    response = result.get_response()
    text, ids = result.as_numpy("text_output"), result.as_numpy("output_ids")
    return {
        "id": response.id,
        "model": response.model_name,
        "final": response.parameters["triton_final_response"].bool_param,
        "text": None if text is None else text[0].decode(),
        "ids": None if ids is None else ids.tolist(),
    }


def stream(client: Any, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """All answers to all requests of one stream."""
    done: queue.Queue[dict[str, Any]] = queue.Queue()
    client.start_stream(lambda result, error: done.put(outcome(result, error)))
    for request in requests:
        client.async_stream_infer(**request)
    answers: list[dict[str, Any]] = []
    left = len(requests)
    while left:
        answers.append(done.get(timeout=60))
        left -= answers[-1].get("final", True)
    client.stop_stream()
    return answers


async def aio_stream(url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield request

    async with triton_aio.InferenceServerClient(url) as client:
        return [outcome(*answer) async for answer in client.stream_infer(requests())]


def refusal(client: Any) -> str:
    try:
        client.infer("gpt", text_inputs(1))
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return ""


def cancelled(client: Any) -> str:
    """What a client hears that ends its stream after the first tokens of an endless text."""
    done: queue.Queue[dict[str, Any]] = queue.Queue()
    client.start_stream(lambda result, error: done.put(outcome(result, error)))
    client.async_stream_infer("gpt", text_inputs(FOREVER))
    first = [done.get(timeout=60) for _ in range(3)]
    assert not any("error" in answer for answer in first), first
    client.stop_stream(cancel_requests=True)
    while "error" not in (answer := done.get(timeout=60)):
        pass
    return str(answer["error"])


def everything(client: Any, url: str) -> dict[str, Any]:
    text = {"model_name": "gpt", "inputs": text_inputs(12), "request_id": "text"}
    together = {"model_name": "gpt", "inputs": text_inputs(12, stream=False), "request_id": "together"}
    ids = {"model_name": "ids", "inputs": id_inputs(12), "request_id": "ids"}
    empty_final = {**text, "enable_empty_final_response": True}
    unary = client.infer("gpt_unary", text_inputs(12, stream=False), request_id="unary")
    return {
        "streamed": stream(client, text, ids, together),
        "empty_final": stream(client, empty_final),
        "aio": asyncio.run(aio_stream(url, text)),
        "unary": [unary.get_response().model_name, unary.as_numpy("text_output")[0].decode()],
        "once": client.infer("once", text_inputs(12, stream=False)).as_numpy("text_output")[0].decode(),
        "refused": refusal(client),
        "cancelled": cancelled(client),
        "decoupled": client.get_model_config("gpt").config.model_transaction_policy.decoupled,
    }


def forever(client: Any) -> None:
    """Say when the first token of an endless text is there, then wait to be killed."""
    first = threading.Event()
    client.start_stream(lambda result, error: first.set())  # noqa: ARG005 - named so by the client
    client.async_stream_infer("gpt", text_inputs(FOREVER))
    assert first.wait(60)
    print("generating", flush=True)
    threading.Event().wait(120)


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as connected:
        if sys.argv[2] == "forever":
            forever(connected)
        else:
            print(json.dumps(everything(connected, sys.argv[1])))
