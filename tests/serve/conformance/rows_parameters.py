"""§5: parameters of requests, tensors and calls."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

from tests.serve.conformance.servers import (
    DEADLINE,
    Calls,
    count,
    eventually,
    floats,
    message,
    status,
    tensor,
    wanted,
)
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"
UNSIGNED = partial(pb.InferParameter)


def unsigned(value: int) -> Any:
    return pb.InferParameter(uint64_param=value)


# What a request of a model without a queue policy or sequences may carry.
REQUEST = (
    ("sequence_id", 7, "OK", "an integer, ignored by a model without sequences"),
    ("sequence_id", "seven", "OK", "a text, ignored by a model without sequences"),
    ("sequence_id", "x" * 128, "OK", "a text of 128 bytes"),
    ("sequence_id", "x" * 129, "UNIMPLEMENTED", "a text of 129 bytes"),
    ("sequence_id", True, INVALID, "a boolean"),
    ("sequence_id", 7.0, INVALID, "a floating-point number"),
    ("sequence_start", True, "OK", "ignored by a model without sequences"),
    ("sequence_start", 1, INVALID, "an integer"),
    ("sequence_end", "true", INVALID, "a text"),
    ("priority", unsigned(1), "OK", "unsigned, as tritonclient sends it; no effect without levels"),
    ("priority", 1, "OK", "signed"),
    ("priority", -1, INVALID, "negative"),
    ("priority", "1", INVALID, "a text"),
    ("timeout", 1, "OK", "no effect without a queue policy"),
    ("timeout", "1", INVALID, "a text"),
    ("timeout", unsigned(1), INVALID, "unsigned"),
    ("triton_enable_empty_final_response", True, "OK", "no effect on a single call"),
    ("triton_enable_empty_final_response", 1, INVALID, "an integer"),
    ("triton_mine", 1, INVALID, "the prefix triton_ is reserved"),
    ("mine", True, "OK", "own key: a boolean"),
    ("mine", 1, "OK", "own key: an integer"),
    ("mine", "x", "OK", "own key: a text"),
    ("mine", 0.5, "OK", "own key: a floating-point number"),
    ("mine", unsigned(1), INVALID, "own key: unsigned"),
    ("mine", pb.InferParameter(), INVALID, "own key: no value"),
    ("headers", "x", "OK", "reserved only by HTTP and its clients"),
    ("binary_data_output", True, "OK", "reserved only by HTTP and its clients"),
)


def send_parameter(servers: Servers, name: str, value: Any) -> None:
    servers.send(message(**{name: value}))


for _name, _value, _code, _text in REQUEST:
    row("5", "message", f"{_name}: {_text}", _code)(partial(send_parameter, name=_name, value=_value))


@row("5", "sync", "tritonclient's own way to give all parameters at once")
def _(servers: Servers) -> None:
    options = {"sequence_id": 5, "sequence_start": True, "sequence_end": True, "priority": 3, "timeout": 9}
    servers.infer("identity_fp32", floats(), parameters={"a": 1, "b": "c", "d": True}, **options)


def classes(servers: Servers, model: str, values: Any, k: int, datatype: str = "FP32") -> Any:
    x = tensor("x", values, datatype)
    answer = servers.infer(model, x, outputs=[triton.InferRequestedOutput("y", class_count=k)])
    texts = answer.as_numpy("y")
    assert answer.get_output("y").datatype == "BYTES"
    return [text.decode() for text in texts.reshape(-1)], list(texts.shape)


SCORES = np.array([[0.25, 0.9, 0.125]], np.float32)
CLASSIFICATION = (
    ("top 2 of 3 with labels, a batch of 1", "labelled", SCORES, 2,
     (["0.900000:1:dog", "0.250000:0:cat"], [1, 2])),
    ("a class without a label", "labelled", SCORES[:, ::-1], 3,
     (["0.900000:1:dog", "0.250000:2", "0.125000:0:cat"], [1, 3])),
    ("more than there are: all", "labelled", SCORES, 9,
     (["0.900000:1:dog", "0.250000:0:cat", "0.125000:2"], [1, 3])),
    ("each row of a batch", "labelled", np.concatenate([SCORES, -SCORES]), 1,
     (["0.900000:1:dog", "-0.125000:2"], [2, 1])),
    ("no batch, no labels: shape [k]", "unlabelled", SCORES[0], 2, (["0.900000:1", "0.250000:0"], [2])),
)  # fmt: skip
for _text, _model, _values, _k, _fact in CLASSIFICATION:
    row("5", "sync", f"classification: {_text}", fact=_fact)(
        partial(classes, model=_model, values=_values, k=_k)
    )


@row("5", "sync", "classification of integers prints integers", fact=(["7:1", "3:0"], [2]))
def _(servers: Servers) -> Any:
    return classes(servers, "identity_int32", np.array([[3, 7]], np.int32), 2, "INT32")


for _datatype, _top in (("FP16", "1.000000:1"), ("BOOL", "1:1")):
    row("5", "sync", f"classification of {_datatype}", fact=([_top], [1]),
        triton="differs: INVALID_ARGUMENT, unsupported type")(
        partial(classes, model=f"identity_{_datatype.lower()}", k=1, datatype=_datatype,
                values=np.array([[0, 1]], {"FP16": np.float16, "BOOL": np.bool_}[_datatype]))
    )  # fmt: skip

for _text, _value in (("0", 0), ("negative", -1), ("a text", "2")):
    row("5", "message", f"classification: {_text}", INVALID)(
        partial(
            lambda servers, value: servers.send(message(outputs=[wanted("y", classification=value)])),
            value=_value,
        )
    )


@row("5", "message", "classification of BYTES", INVALID, triton="differs: the server dies")
def _(servers: Servers) -> Any:
    text = tensor("x", np.array([[b"a", b"b"]], np.object_), "BYTES")
    return servers.infer("identity_bytes", text, outputs=[triton.InferRequestedOutput("y", class_count=1)])


@row("5", "sync", "priority: what waits with level 1 overtakes what waits with level 2", fact=True)
def _(servers: Servers) -> Any:
    calls = Calls(servers.client)
    calls.send("queue_priority", count(20_000), name="blocks")
    eventually(lambda: _blocked(servers, calls, "queue_priority"))
    calls.send("queue_priority", count(2000), name="urgent", priority=1)
    order = [name for name, _ in calls.rest()]
    return order[order.index("urgent") :].count("patient") >= PATIENT


PATIENT = 2


def _blocked(servers: Servers, calls: Calls, model: str) -> bool:
    """Send until two requests wait beside the one that may not have begun yet."""
    if servers.pending(model) > PATIENT:
        return True
    # Long enough for answers to be seen in the order in which they were sent.
    calls.send(model, count(2000), name="patient")
    return False


def outcomes(servers: Servers, model: str, **options: Any) -> Any:
    """What becomes of requests that wait behind one of 100 ms."""
    calls = Calls(servers.client)
    for n in (1000, 1000, 1, 1):
        calls.send(model, count(n), **options)
    return sorted({code for _, code in calls.rest()})


SPENT = ["OK", "UNAVAILABLE"]


@row("5", "sync", "timeout: shortens the queue's own where the config allows it", fact=SPENT)
def _(servers: Servers) -> Any:
    return outcomes(servers, "queue_override", timeout=1000)


@row("5", "sync", "timeout: no effect where the config doesn't allow it", fact=["OK"])
def _(servers: Servers) -> Any:
    return outcomes(servers, "queue_fixed", timeout=1000)


@row("5", "sync", "timeout: can't lengthen the queue's own", fact=SPENT)
def _(servers: Servers) -> Any:
    return outcomes(servers, "queue_reject", timeout=60_000_000)


def compressed(servers: Servers, algorithm: str) -> Any:
    return servers.infer("identity_fp32", floats(), compression_algorithm=algorithm).as_numpy("y").tolist()


for _algorithm in ("gzip", "deflate"):
    row("5", "sync", f"a request compressed with {_algorithm}", fact=[[1.0, 2.0]])(
        partial(compressed, algorithm=_algorithm)
    )

# Metadata

KEY = {"triton-grpc-protocol-key": "secret"}
PROTOCOLS = {
    "metadata": lambda client, headers: client.get_server_metadata(headers=headers),
    "inference": lambda client, headers: client.infer("kept", [floats(values=[[1] * 4])], headers=headers),
    "shared-memory": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
    "model-config": lambda client, headers: client.get_model_config("kept", headers=headers),
    "model-repository": lambda client, headers: client.get_model_repository_index(headers=headers),
    "statistics": lambda client, headers: client.get_inference_statistics("kept", headers=headers),
    "trace": lambda client, headers: client.get_trace_settings(headers=headers),
    "logging": lambda client, headers: client.get_log_settings(headers=headers),
}


def protocol(servers: Servers, group: str) -> Any:
    call = PROTOCOLS[group]
    tried = (None, {"triton-grpc-protocol-key": "wrong"}, KEY)
    return [status(partial(call, servers.restricted, headers)) for headers in tried]


for _group in PROTOCOLS:
    row("5", "sync", f"restricted protocol {_group}: without its header, a wrong one, the right one",
        fact=["UNAVAILABLE", "UNAVAILABLE", "OK"])(partial(protocol, group=_group))  # fmt: skip


@row("5", "sync", "a group that is not restricted needs no header (health)", fact=True)
def _(servers: Servers) -> Any:
    return servers.restricted.is_server_live()


@row("5", "stream", "restricted protocol inference: a stream without its header", "UNAVAILABLE")
def _(servers: Servers) -> Any:
    return list(servers.stub("restricted").ModelStreamInfer(iter([]), timeout=DEADLINE))
