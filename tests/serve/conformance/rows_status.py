"""§7: status codes of models, versions, requests and sequences."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio

from tests.serve.conformance.servers import (
    DEADLINE,
    SERVICE,
    Calls,
    count,
    floats,
    given,
    message,
    status,
    tensor,
)
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"
FOUR = floats(values=[[1, 2, 3, 4]])

# Models and versions

LOOKUPS = {
    "ModelInfer": lambda client, name, version: client.infer(name, [FOUR], model_version=version),
    "ModelMetadata": lambda client, name, version: client.get_model_metadata(name, version),
    "ModelConfig": lambda client, name, version: client.get_model_config(name, version),
}
MISSING = (
    ("an unknown model", "nope", "", "NOT_FOUND"),
    ("an empty model name", "", "", "NOT_FOUND"),
    ("an unknown version", "latest", "7", "NOT_FOUND"),
    ("version 0", "latest", "0", "NOT_FOUND"),
    ("a version that is no number", "latest", "x", INVALID),
    ("a negative version", "latest", "-1", INVALID),
)


def look_up(servers: Servers, rpc: str, name: str, version: str) -> Any:
    return LOOKUPS[rpc](servers.client, name, version)


for _rpc in LOOKUPS:
    for _text, _name, _version, _code in MISSING:
        row("7", "sync", f"{_rpc} of {_text}", _code)(
            partial(look_up, rpc=_rpc, name=_name, version=_version)
        )

READY = (
    ("a model", "latest", "", True),
    ("a version", "latest", "10", True),
    ("an unknown model", "nope", "", False),
    ("an unknown version", "latest", "7", False),
    ("an empty model name", "", "", False),
)


def is_ready(servers: Servers, name: str, version: str) -> Any:
    return servers.client.is_model_ready(name, version)


for _text, _name, _version, _fact in READY:
    row("7", "sync", f"ModelReady of {_text}: {_fact}, not an error", fact=_fact)(
        partial(is_ready, name=_name, version=_version)
    )
row("7", "sync", "ModelReady of a version that is no number", INVALID)(
    partial(is_ready, name="latest", version="x")
)


@row("7", "sync", "ModelStatistics of an unknown model", INVALID)
def _(servers: Servers) -> Any:
    return servers.client.get_inference_statistics("nope")


@row("7", "sync", "ModelStatistics of an unknown version", INVALID)
def _(servers: Servers) -> Any:
    return servers.client.get_inference_statistics("latest", "7")


@row("7", "message", "an unknown method", "UNIMPLEMENTED")
def _(servers: Servers) -> Any:
    return servers.channels["served"].unary_unary(f"{SERVICE}ModelTrain")(b"", timeout=DEADLINE)


# Requests

SHORT, LONG = np.ones((1, 3), np.float32), np.ones((5, 3), np.float32)


def refused(what: str, model: str, *inputs: Any, via: str = "sync", **options: Any) -> None:
    row("7", via, what, INVALID)(lambda servers: servers.infer(model, *inputs, **options))


refused("a datatype that is not the input's", "fixed", tensor("x", SHORT.astype(np.int32), "INT32"))
refused("a datatype of the same size", "identity_int64", tensor("x", np.ones((1, 1)), "FP64"))
refused("a shape of another rank", "fixed", floats(values=[1, 2, 3]))
refused("another size of a fixed dimension", "fixed", floats(values=[[1, 2, 3, 4]]))
refused("a batch above max_batch_size", "batched", floats("a", LONG), floats("b", LONG))
refused("a missing input", "batched", floats("a", SHORT))
refused("no inputs", "batched")
refused("one input too many", "batched", *(floats(name, SHORT) for name in ("a", "b", "c")))
refused("an input twice", "batched", *(floats(name, SHORT) for name in ("a", "b", "a")))
refused("an unknown input instead of a known one", "batched", floats("a", SHORT), floats("c", SHORT))
refused("an unknown output", "fixed", floats(values=SHORT), outputs=[triton.InferRequestedOutput("z")])

for _text, _datatype in (("unknown", "FLOAT32"), ("empty", ""), ("in lower case", "fp32")):
    row("7", "message", f"a datatype that is {_text}", INVALID)(
        partial(
            lambda servers, given_: servers.send(message("identity_fp32", given_)),
            given_=given(datatype=_datatype),
        )
    )


@row("7", "message", "an input without a name", INVALID)
def _(servers: Servers) -> Any:
    return servers.send(message("identity_fp32", given("")))


@row(
    "7",
    "message",
    "bytes that are no message",
    INVALID,
    triton="differs: INTERNAL, from gRPC itself; the client is at fault",
)
def _(servers: Servers) -> Any:
    return servers.channels["served"].unary_unary(f"{SERVICE}ModelInfer")(b"\xff\xff", timeout=DEADLINE)


@row("7", "sync", "a graph that fails while it runs", "INTERNAL")
def _(servers: Servers) -> Any:
    return servers.infer("gather", tensor("x", np.array([9]), "INT64"))


# Queues


def sent_at_once(servers: Servers, model: str, counts: tuple[int, ...]) -> list[str]:
    calls = Calls(servers.client)
    for n in counts:
        calls.send(model, count(n))
    return sorted({code for _, code in calls.rest()})


BOTH = ["OK", "UNAVAILABLE"]


@row("7", "sync", "a full queue: some are answered, the others refused", fact=BOTH)
def _(servers: Servers) -> Any:
    return sent_at_once(servers, "queue_size", (1000,) * 8)


@row("7", "sync", "waiting past the queue's timeout, action REJECT", fact=BOTH)
def _(servers: Servers) -> Any:
    return sent_at_once(servers, "queue_reject", (1000, 1000, 1, 1))


@row("7", "sync", "waiting past the queue's timeout, action DELAY: all are answered", fact=["OK"])
def _(servers: Servers) -> Any:
    return sent_at_once(servers, "queue_delay", (1000, 1000, 1, 1))


@row("7", "sync", "the client's deadline", "DEADLINE_EXCEEDED")
def _(servers: Servers) -> Any:
    return servers.infer("slow", count(100_000), client_timeout=0.1)


@row("7", "sync", "cancelling a call, and the model is free again", fact=["CANCELLED", "OK"])
def _(servers: Servers) -> Any:
    calls = Calls(servers.client)
    calls.send("slow", count(100_000)).cancel()
    return [calls.next()[1], status(lambda: servers.infer("slow", count(1), client_timeout=DEADLINE))]


# tritonclient's aio


def aio(servers: Servers, name: str, act: Any) -> Any:
    async def run() -> Any:
        async with tritonclient.grpc.aio.InferenceServerClient(servers.addresses[name]["url"]) as client:
            return await act(client)

    return asyncio.run(run())


AIO = {
    "is_server_live": ("OK", True, lambda client: client.is_server_live()),
    "is_server_ready": ("OK", True, lambda client: client.is_server_ready()),
    "is_model_ready": ("OK", True, lambda client: client.is_model_ready("latest")),
    "infer of an unknown model": ("NOT_FOUND", None, lambda client: client.infer("nope", [FOUR])),
    "infer with a wrong shape": (INVALID, None, lambda client: client.infer("fixed", [FOUR])),
    "infer past its deadline": (
        "DEADLINE_EXCEEDED", None, lambda client: client.infer("slow", [count(100_000)], client_timeout=0.1),
    ),
    "infer that fails while it runs": (
        "INTERNAL", None, lambda client: client.infer("gather", [tensor("x", np.array([9]), "INT64")]),
    ),
    "get_model_metadata of an unknown version": (
        "NOT_FOUND", None, lambda client: client.get_model_metadata("latest", "7"),
    ),
    "load_model when the mode is none": ("UNAVAILABLE", None, lambda client: client.load_model("latest")),
}  # fmt: skip
for _text, (_code, _result, _act) in AIO.items():
    row("7", "aio", _text, _code, _result)(partial(aio, name="served", act=_act))


@row("7", "aio", "many at once, each gets its own answer", fact=[float(n) for n in range(20)])
def _(servers: Servers) -> Any:
    async def all_at_once(client: Any) -> Any:
        sent = (client.infer("identity_fp32", [floats(values=[[n]])]) for n in range(20))
        return [answer.as_numpy("y").item() for answer in await asyncio.gather(*sent)]

    return aio(servers, "served", all_at_once)
