"""§4.9 and §4.10: shapes and versions of models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.serve.conformance.servers import floats, tensor
from tests.serve.conformance.table import NO_BACKEND, Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"


def _shapes(servers: Servers, model: str) -> Any:
    metadata = servers.client.get_model_metadata(model)
    return [list(each.shape) for each in (*metadata.inputs, *metadata.outputs)]


@row("4.9", "sync", "max_batch_size > 0: metadata's shapes are [-1] + dims", fact=[[-1, 3]] * 4)
def _(servers: Servers) -> Any:
    return _shapes(servers, "batched")


@row("4.9", "sync", "max_batch_size = 0: metadata's shapes are dims", fact=[[1, 3]] * 2)
def _(servers: Servers) -> Any:
    return _shapes(servers, "fixed")


@row("4.10", "sync", "metadata of a version lists only that", fact=["2"])
def _(servers: Servers) -> Any:
    return list(servers.client.get_model_metadata("all", "2").versions)


@row(
    "4.9",
    "sync",
    "a reshaped tensor: clients see dims, the model another shape",
    fact=([[-1, 1]] * 2, [2, 1]),
)
def _(servers: Servers) -> Any:
    answer = servers.infer("reshaped", floats(values=[[1], [2]])).get_response()
    return _shapes(servers, "reshaped"), list(answer.outputs[0].shape)


@row("4.9", "sync", "the batch dimension must be sent", INVALID)
def _(servers: Servers) -> Any:
    return servers.infer("batched", floats("a", [1, 2, 3]), floats("b", [1, 2, 3]))


@row("4.9", "sync", "inputs of different batch sizes", INVALID)
def _(servers: Servers) -> Any:
    return servers.infer("batched", floats("a", [[1, 2, 3]]), floats("b", [[1, 2, 3]] * 2))


def _factor(servers: Servers, model: str, version: str) -> Any:
    answer = servers.infer(model, floats(values=[[1, 0, 0, 0]]), model_version=version)
    return answer.as_numpy("y")[0][0].item()


VERSIONS = (
    ("latest", "", "OK", 10.0, "the default is the highest version, as a number"),
    ("latest", "9", "NOT_FOUND", None, "default policy: only the highest version is served"),
    ("all", "2", "OK", 2.0, "policy all: each version answers"),
    ("all", "", "OK", 10.0, "policy all: the default is the highest"),
    ("specific", "", "OK", 9.0, "policy specific: the default is the highest of those named"),
    ("specific", "10", "NOT_FOUND", None, "policy specific: another version is not served"),
    ("all", "010", "OK", 10.0, "leading zeros of a version are taken"),
    ("all", "x", INVALID, None, "a version that is no number"),
    ("all", "-1", INVALID, None, "a negative version"),
    ("all", "99999999999999999999", INVALID, None, "a version past 64 bits"),
)  # fmt: skip
for model, version, code, factor, text in VERSIONS:
    row("4.10", "sync", f"{text} ({version or 'none'} asked for)", code, factor)(
        partial(_factor, model=model, version=version)
    )


for _version in ("9.0", " 9", "+9"):
    row("4.10", "sync", f"a version that only begins or ends as one, {_version!r}", INVALID,
        triton="differs: reads it as 9")(partial(_factor, model="all", version=_version))  # fmt: skip


@row("4.10", "sync", "metadata lists all ready versions", fact=[["2", "9", "10"], ["10"], ["2", "9"]])
def _(servers: Servers) -> Any:
    models = ("all", "latest", "specific")
    return [sorted(servers.client.get_model_metadata(name).versions, key=int) for name in models]


@row(
    "4.9",
    "sync",
    "the graph's own shape is checked where config.pbtxt says nothing",
    INVALID,
    triton=NO_BACKEND,
)
def _(servers: Servers) -> Any:
    return servers.infer("gather", tensor("x", np.zeros((1, 1), np.int64), "INT64"))
