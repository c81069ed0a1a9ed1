"""§6: ModelStreamInfer."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from tests.serve.conformance.servers import DEADLINE, floats, message, status, stream
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row


def slow(n: int, identity: str) -> Any:
    made = pb.ModelInferRequest(model_name="slow", id=identity, raw_input_contents=[np.int64(n).tobytes()])
    made.inputs.add(name="n", datatype="INT64", shape=[1, 1])
    return made


def gather(index: int, identity: str) -> Any:
    made = pb.ModelInferRequest(
        model_name="gather", id=identity, raw_input_contents=[np.int64(index).tobytes()]
    )
    made.inputs.add(name="x", datatype="INT64", shape=[1])
    return made


def seen(answers: list[Any]) -> list[Any]:
    return [(answer.infer_response.id, bool(answer.error_message)) for answer in answers]


def client_stream(servers: Servers, requests: list[dict[str, Any]]) -> list[Any]:
    """What tritonclient's own stream makes of each request: a result or an error."""
    done: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(servers.addresses["served"]["url"]) as client:
        client.start_stream(lambda result, error: done.put(error or result), stream_timeout=DEADLINE)
        for request in requests:
            client.async_stream_infer(**request)
        return [done.get(timeout=DEADLINE) for _ in requests]


@row("6", "stream", "answers come in the order of the requests, a slow one first",
     fact=[("slow", False), ("fast", False)])  # fmt: skip
def _(servers: Servers) -> Any:
    return seen(stream(servers, [slow(500, "slow"), slow(1, "fast")]))


@row("6", "stream", "several models on one stream, one answer each", fact=["a", "b", "c"])
def _(servers: Servers) -> Any:
    sent = [message(id="a"), slow(1, "b"), gather(1, "c")]
    return sorted(answer.infer_response.id for answer in stream(servers, sent))


@row("6", "stream", "a request that is wrong is answered in-band, and the stream goes on",
     fact=[("wrong", True), ("right", False)])  # fmt: skip
def _(servers: Servers) -> Any:
    return seen(stream(servers, [message(id="wrong", raw=[b""]), message(id="right")]))


@row("6", "stream", "an unknown model is answered in-band", fact=[("a", True), ("b", False)])
def _(servers: Servers) -> Any:
    return seen(stream(servers, [message("nope", id="a"), message(id="b")]))


@row("6", "stream", "a reserved parameter is answered in-band", fact=[("a", True), ("b", False)])
def _(servers: Servers) -> Any:
    return seen(stream(servers, [message(id="a", triton_mine=1), message(id="b")]))


@row("6", "stream", "a model's error is answered in-band", fact=[("a", True), ("b", False)])
def _(servers: Servers) -> Any:
    return seen(stream(servers, [gather(9, "a"), gather(1, "b")]))


@row("6", "stream", "beside error_message only the id is set", fact=["id"])
def _(servers: Servers) -> Any:
    (answer,) = stream(servers, [message("nope", id="a")])
    return [field.name for field, _ in answer.infer_response.ListFields()]


@row("6", "stream", "beside the error_message of a run that failed: the id, the model, and that it was final",
     fact=("a", "gather", True))  # fmt: skip
def _(servers: Servers) -> Any:
    (answer,) = stream(servers, [gather(9, "a")])
    return answer.infer_response.id, answer.infer_response.model_name, _final(answer)


def _final(answer: Any) -> Any:
    found = answer.infer_response.parameters.get("triton_final_response")
    return None if found is None else found.bool_param


@row("6", "stream", "each answer is marked as the final one", fact=[True, True])
def _(servers: Servers) -> Any:
    return [_final(answer) for answer in stream(servers, [message(), message()])]


@row("6", "message", "an answer to a single call is not", fact=False)
def _(servers: Servers) -> Any:
    return "triton_final_response" in servers.send(message()).parameters


@row(
    "6",
    "stream",
    "asking for empty final responses adds none where there is one answer",
    fact=[(1, True)] * 2,
)
def _(servers: Servers) -> Any:
    answers = stream(servers, [message(triton_enable_empty_final_response=True)] * 2)
    return [(len(answer.infer_response.outputs), _final(answer)) for answer in answers]


@row("6", "stream", "closing the client's side: what is outstanding is answered, then the status is OK",
     fact=([("a", False)], "OK"))  # fmt: skip
def _(servers: Servers) -> Any:
    call = servers.stub().ModelStreamInfer(iter([slow(500, "a")]), timeout=DEADLINE)
    return seen(list(call)), call.code().name


@row("6", "stream", "a stream without requests ends OK", fact=[])
def _(servers: Servers) -> Any:
    return stream(servers, [])


@row("6", "stream", "cancelling a stream: CANCELLED, and the server goes on", fact=("CANCELLED", "OK"))
def _(servers: Servers) -> Any:
    waiting: queue.Queue[Any] = queue.Queue()
    waiting.put(message())
    call = servers.stub().ModelStreamInfer(iter(waiting.get, None), timeout=DEADLINE)
    next(call)
    waiting.put(slow(100_000, "a"))
    call.cancel()
    ended = status(lambda: next(call))
    waiting.put(None)
    return ended, status(lambda: servers.send(message()))


@row("6", "stream", "a deadline on the stream", "DEADLINE_EXCEEDED")
def _(servers: Servers) -> Any:
    return list(servers.stub().ModelStreamInfer(iter([slow(100_000, "a")]), timeout=0.1))


@row("6", "stream", "ten requests by tritonclient, ids and values in order",
     fact=[(str(n), [[float(n), 0.0]]) for n in range(10)])  # fmt: skip
def _(servers: Servers) -> Any:
    requests = [
        {"model_name": "identity_fp32", "inputs": [floats(values=[[n, 0]])], "request_id": str(n)}
        for n in range(10)
    ]
    answers = client_stream(servers, requests)
    return [(answer.get_response().id, answer.as_numpy("y").tolist()) for answer in answers]


@row("6", "stream", "tritonclient takes an in-band error for that request's, the next one is answered",
     fact=[True, False])  # fmt: skip
def _(servers: Servers) -> Any:
    requests = [{"model_name": model, "inputs": [floats()]} for model in ("nope", "identity_fp32")]
    return [isinstance(answer, InferenceServerException) for answer in client_stream(servers, requests)]


@row("6", "stream", "a sequence over one stream", fact=[1.0, 3.0, 6.0])
def _(servers: Servers) -> Any:
    flags = [{"sequence_start": n == 1, "sequence_end": n == 3, "sequence_id": 600} for n in (1, 2, 3)]
    requests = [
        {"model_name": "sum", "inputs": [floats(values=[[n]])], **flag} for n, flag in enumerate(flags, 1)
    ]
    return [answer.as_numpy("y").item() for answer in client_stream(servers, requests)]


@row("6", "aio", "tritonclient's aio stream: values and errors in order", fact=[1.0, "failed", 3.0])
def _(servers: Servers) -> Any:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for n, model in ((1, "identity_fp32"), (2, "nope"), (3, "identity_fp32")):
            yield {"model_name": model, "inputs": [floats(values=[[n, 0]])]}

    async def run() -> list[Any]:
        found: list[Any] = []
        async with tritonclient.grpc.aio.InferenceServerClient(servers.addresses["served"]["url"]) as client:
            async for result, error in client.stream_infer(requests()):
                found.append("failed" if error else result.as_numpy("y")[0][0].item())
        return found

    return asyncio.run(run())


@row("6", "message", "a decoupled model: refused when it is loaded, as a graph answers once",
     "INVALID_ARGUMENT", triton="differs: loads it, and a single call to it is UNIMPLEMENTED")  # fmt: skip
def _(servers: Servers) -> Any:
    return servers.controlled.load_model("decoupled")
