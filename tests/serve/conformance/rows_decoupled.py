"""§6: ModelStreamInfer of a decoupled model; Triton's twin flags its last answer as the final one."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio

from tests.serve.conformance.rows_streams import slow
from tests.serve.conformance.servers import DEADLINE, given, message, status, stream, tensor
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row

LONG = 150_000  # tokens: seconds, so that only a cancellation ends it


def count(tokens: int, identity: str = "", *, first: int = 0, **options: Any) -> Any:
    """A request for `tokens` tokens after `first`, one answer each: always one more."""
    inputs = (
        given("input_ids", "INT64", [1]), given("max_tokens", "INT32", [1]), given("stream", "BOOL", [1]),
    )  # fmt: skip
    raw = [np.int64(first).tobytes(), np.int32(tokens).tobytes(), b"\1"]
    return message("counter", *inputs, raw=raw, id=identity, **options)


def wrong(identity: str) -> Any:
    inputs = (given("input_ids", "INT64", [1]), given("max_tokens", "FP32", [1]))
    return message("counter", *inputs, raw=[bytes(8), bytes(4)], id=identity)


def by_client(tokens: int) -> dict[str, Any]:
    """The same request by tritonclient."""
    limit, stream_tokens = np.array([tokens], np.int32), np.array([True])
    inputs = [
        tensor("input_ids", np.array([0]), "INT64"), tensor("max_tokens", limit, "INT32"),
        tensor("stream", stream_tokens, "BOOL"),
    ]  # fmt: skip
    return {"model_name": "counter", "inputs": inputs}


def tokens_of(answer: Any) -> list[int]:
    response = answer.infer_response
    outputs = [output.name for output in response.outputs]
    raw = response.raw_output_contents[outputs.index("output_ids")]
    return list(np.frombuffer(raw, np.int64).tolist())


def final(answer: Any) -> Any:
    found = answer.infer_response.parameters.get("triton_final_response")
    return None if found is None else found.bool_param


def counted(answers: list[Any]) -> list[Any]:
    return [(tokens_of(answer), final(answer)) for answer in answers]


def seen(answers: list[Any]) -> list[Any]:
    return [(answer.infer_response.id, bool(answer.error_message)) for answer in answers]


def ends(answers: list[Any]) -> list[str]:
    """The requests in the order of their last answers."""
    return [answer.infer_response.id for answer in answers if final(answer)]


THREE = [([1], False), ([2], False), ([3], True)]


@row("6", "stream", "a decoupled model: an answer a token, the last marked as the final one", fact=THREE)
def _(servers: Servers) -> Any:
    return counted(stream(servers, [count(3)]))


@row("6", "stream", "a decoupled model's only answer is the final one", fact=[([1], True)])
def _(servers: Servers) -> Any:
    return counted(stream(servers, [count(1)]))


@row("6", "stream", "asking a decoupled model for empty final responses adds none where the last has data",
     fact=THREE)  # fmt: skip
def _(servers: Servers) -> Any:
    return counted(stream(servers, [count(3, triton_enable_empty_final_response=True)]))


@row("6", "stream", "each of a decoupled model's answers has the id, the model's name and version",
     fact=[("a", "counter", "1")] * 3)  # fmt: skip
def _(servers: Servers) -> Any:
    answers = [answer.infer_response for answer in stream(servers, [count(3, "a")])]
    return [(answer.id, answer.model_name, answer.model_version) for answer in answers]


@row("6", "message", "a single call to a decoupled model", "UNIMPLEMENTED")
def _(servers: Servers) -> Any:
    return servers.send(count(3))


@row("6", "sync", "a single call to a decoupled model by tritonclient", "UNIMPLEMENTED")
def _(servers: Servers) -> Any:
    return servers.infer("counter", tensor("input_ids", np.array([1]), "INT64"))


@row("6", "stream", "a wrong request to a decoupled model is answered in-band, and the stream goes on",
     fact=([("wrong", True)], [("right", False)] * 3))  # fmt: skip
def _(servers: Servers) -> Any:
    answers = seen(stream(servers, [wrong("wrong"), count(3, "right")]))
    return [each for each in answers if each[1]], [each for each in answers if not each[1]]


@row("6", "stream", "beside a decoupled model's error_message only the id is set", fact=["id"])
def _(servers: Servers) -> Any:
    (answer,) = stream(servers, [wrong("wrong")])
    return [field.name for field, _ in answer.infer_response.ListFields()]


@row("6", "stream", "a wrong request to a decoupled model is answered in-band also by triton_grpc_error",
     fact=[("wrong", True)])  # fmt: skip
def _(servers: Servers) -> Any:
    return seen(stream(servers, [wrong("wrong")], metadata=[("triton_grpc_error", "true")]))


@row("6", "stream", "a decoupled model doesn't wait for a slow request before it", fact=["count", "slow"])
def _(servers: Servers) -> Any:
    return ends(stream(servers, [slow(3000, "slow"), count(3, "count")]))


@row("6", "stream", "a wrong request to a decoupled model doesn't wait for a slow one before it",
     fact=[("wrong", True), ("slow", False)])  # fmt: skip
def _(servers: Servers) -> Any:
    return seen(stream(servers, [slow(3000, "slow"), wrong("wrong")]))


@row("6", "stream", "other requests don't wait for a decoupled model's last answer; they keep their order",
     fact=["a", "b", "c", "count"])  # fmt: skip
def _(servers: Servers) -> Any:
    return ends(stream(servers, [count(3000, "count"), message(id="a"), slow(10, "b"), message(id="c")]))


@row("6", "stream", "two requests to a decoupled model on one stream: each one's answers are in order",
     fact=[(n % 16, (n + 7) % 16) for n in range(1, 101)])  # fmt: skip
def _(servers: Servers) -> Any:
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for answer in stream(servers, [count(100, "a"), count(100, "b", first=7)]):
        tokens[answer.infer_response.id] += tokens_of(answer)
    return list(zip(tokens["a"], tokens["b"], strict=True))


@row("6", "stream", "closing the client's side: a decoupled model answers to the end, then the status is OK",
     fact=(300, ["a"], "OK"))  # fmt: skip
def _(servers: Servers) -> Any:
    call = servers.stub().ModelStreamInfer(iter([count(300, "a")]), timeout=DEADLINE)
    answers = list(call)
    return len(answers), ends(answers), call.code().name


@row("6", "stream", "cancelling a stream amid a decoupled model's answers: CANCELLED, and the server goes on",
     fact=("CANCELLED", THREE))  # fmt: skip
def _(servers: Servers) -> Any:
    call = servers.stub().ModelStreamInfer(iter([count(LONG)]), timeout=DEADLINE)
    for _ in range(10):
        next(call)
    call.cancel()
    ended = status(lambda: list(call))
    return ended, counted(stream(servers, [count(3)]))


@row("6", "stream", "a deadline amid a decoupled model's answers", "DEADLINE_EXCEEDED")
def _(servers: Servers) -> Any:
    return len(list(servers.stub().ModelStreamInfer(iter([count(LONG)]), timeout=0.3)))


@row(
    "6",
    "stream",
    "a decoupled model by tritonclient: its answers, and which is final",
    fact=THREE,
)
def _(servers: Servers) -> Any:
    done: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(servers.addresses["served"]["url"]) as client:
        client.start_stream(lambda result, error: done.put(error or result), stream_timeout=DEADLINE)
        client.async_stream_infer(**by_client(3))
        results = [done.get(timeout=DEADLINE) for _ in THREE]
    answers = [result.get_response() for result in results]
    finals = [answer.parameters["triton_final_response"].bool_param for answer in answers]
    tokens = [result.as_numpy("output_ids").tolist() for result in results]
    return list(zip(tokens, finals, strict=True))


@row("6", "aio", "stream_infer of a decoupled model, with a plain one before it", fact=([1, 2, 3], 1))
def _(servers: Servers) -> Any:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "gather", "inputs": [tensor("x", np.array([1]), "INT64")]}
        yield by_client(3)

    async def run() -> Any:
        tokens, others = [], 0
        async with tritonclient.grpc.aio.InferenceServerClient(servers.addresses["served"]["url"]) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                if result.get_response().model_name == "counter":
                    tokens += result.as_numpy("output_ids").tolist()
                else:
                    others += 1
        return tokens, others

    return asyncio.run(run())


@row("6", "sync", "a decoupled model's config says that it is", fact=True)
def _(servers: Servers) -> Any:
    return servers.client.get_model_config("counter").config.model_transaction_policy.decoupled
