"""§4: tensor data."""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import tritonclient.grpc as triton

from tests.serve.conformance.servers import EIGHT, floats, given, message, tensor
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"

RAW = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64,
    "BYTES": np.object_,
}  # fmt: skip
FIELDS = {
    "BOOL": ("bool_contents", [True, False]),
    "UINT8": ("uint_contents", [1, 255]),
    "UINT16": ("uint_contents", [1, 65535]),
    "UINT32": ("uint_contents", [1, 2**32 - 1]),
    "UINT64": ("uint64_contents", [1, 2**64 - 1]),
    "INT8": ("int_contents", [-1, 127]),
    "INT16": ("int_contents", [-1, 2**15 - 1]),
    "INT32": ("int_contents", [-1, 2**31 - 1]),
    "INT64": ("int64_contents", [-1, 2**63 - 1]),
    "FP32": ("fp32_contents", [0.5, -1.0]),
    "FP64": ("fp64_contents", [0.5, -1.0]),
    "BYTES": ("bytes_contents", [b"a", b""]),
}


def packed(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def raw_bytes(datatype: str) -> bytes:
    if datatype == "BYTES":
        return packed(b"one", b"", b"\x00\xc3\xa9")
    return np.array([0, 1, 1]).astype(RAW[datatype]).tobytes()


def echo_raw(datatype: str, servers: Servers) -> bool:
    sent = raw_bytes(datatype)
    answer = servers.send(message(f"identity_{datatype.lower()}", given("x", datatype, [1, 3]), raw=[sent]))
    return bool(answer.raw_output_contents[0] == sent)


def echo_typed(datatype: str, servers: Servers) -> list[Any]:
    field, values = FIELDS[datatype]
    sent = given("x", datatype, [1, 2], {field: values})
    answer = servers.send(message(f"identity_{datatype.lower()}", sent))
    got = triton.InferResult(answer).as_numpy("y").tolist()[0]
    return [got == values, len(answer.raw_output_contents), answer.outputs[0].HasField("contents")]


for name in RAW:
    row("4.1", "message", f"{name} as raw bytes comes back as it went", fact=True)(partial(echo_raw, name))
for name in FIELDS:
    row(
        "4.3", "message", f"{name} as typed contents is taken, and answered raw (4.6)", fact=[True, 1, False]
    )(partial(echo_typed, name))


@row(
    "4.1", "message", "raw entries belong to the inputs in the order of the request", fact=[-2.0, -2.0, -2.0]
)
def _(servers: Servers) -> Any:
    a, b = (np.full((1, 3), value, np.float32).tobytes() for value in (1, 3))
    sent = message("batched", given("b", shape=[1, 3]), given("a", shape=[1, 3]), raw=[b, a])
    return triton.InferResult(servers.send(sent)).as_numpy("difference").tolist()[0]


@row("4.1", "message", "raw entries past the last input are ignored", fact=EIGHT)
def _(servers: Servers) -> Any:
    return servers.send(message(raw=[EIGHT, b"more"])).raw_output_contents[0]


def _refused(section: str, what: str, sent: Any, triton_says: str = "same") -> None:
    row(section, "message", what, INVALID, triton=triton_says)(lambda servers: servers.send(sent))


ONES = {"fp32_contents": [1.0, 2.0]}
A, B = given("a", shape=[1, 3]), given("b", shape=[1, 3], contents={"fp32_contents": [1, 2, 3]})
_refused("4.2", "raw entries beside typed contents of the same input", message(
    "identity_fp32", given(contents=ONES), raw=[EIGHT]))  # fmt: skip
_refused("4.2", "one input raw, the other typed", message("batched", A, B, raw=[EIGHT + EIGHT[:4]]))
_refused("4.2", "one input typed, the other raw", message("batched", B, A, raw=[EIGHT + EIGHT[:4]]))
_refused("4.2", "an input with neither raw entry nor contents", message(raw=[]))
_refused("4.2", "fewer raw entries than inputs", message(
    "batched", A, given("b", shape=[1, 3]), raw=[EIGHT + EIGHT[:4]]))  # fmt: skip
_refused("4.3", "FP16 has no typed contents", message(
    "identity_fp16", given("x", "FP16", contents=ONES)))  # fmt: skip
_refused("4.3", "BF16 has no typed contents", message(
    "identity_bf16", given("x", "BF16", contents=ONES)))  # fmt: skip
_refused("4.3", "FP32 in int_contents", message(
    "identity_fp32", given(contents={"int_contents": [1, 2]})))  # fmt: skip
_refused("4.3", "INT64 in int_contents", message(
    "identity_int64", given("x", "INT64", contents={"int_contents": [1, 2]})))  # fmt: skip
_refused("4.3", "BYTES in fp32_contents", message(
    "identity_bytes", given("x", "BYTES", contents=ONES)))  # fmt: skip
_refused("4.3", "typed contents with too few elements", message(
    "identity_fp32", given(contents={"fp32_contents": [1.0]})))  # fmt: skip
_refused("4.3", "typed contents with too many elements", message(
    "identity_fp32", given(contents={"fp32_contents": [1.0] * 3})))  # fmt: skip
_refused("4.3", "contents that are there and empty", message("identity_fp32", given(contents={})))

LOW_BYTES = {
    "INT8": ("int_contents", 300, 44),
    "INT16": ("int_contents", 70000, 4464),
    "UINT8": ("uint_contents", 300, 44),
    "UINT16": ("uint_contents", 70000, 4464),
}


def low_bytes(datatype: str, servers: Servers) -> Any:
    field, value, _ = LOW_BYTES[datatype]
    sent = given("x", datatype, [1, 1], {field: [value]})
    answer = servers.send(message(f"identity_{datatype.lower()}", sent))
    return triton.InferResult(answer).as_numpy("y").tolist()[0][0]


for name, (_field, wide, low) in LOW_BYTES.items():
    row("4.3", "message", f"{name} takes the low bytes of {wide}", fact=low)(partial(low_bytes, name))


def _text(raw: bytes, shape: tuple[int, int] = (1, 2)) -> Any:
    return message("identity_bytes", given("x", "BYTES", shape), raw=[raw])


_refused("4.4", "BYTES: a length prefix is cut off", _text(packed(b"a") + b"\x01\x00"))
_refused("4.4", "BYTES: an element is shorter than its length", _text(packed(b"a") + b"\x09\x00\x00\x00b"))
_refused("4.4", "BYTES: too few elements", _text(packed(b"a")))
_refused("4.4", "BYTES: too many elements", _text(packed(b"a", b"b", b"c")))
_refused("4.4", "BYTES: no bytes for two elements", _text(b""))


@row("4.4", "sync", "BYTES: empty elements and zero bytes are kept", fact=[b"", b"\x00a"])
def _(servers: Servers) -> Any:
    sent = tensor("x", np.array([[b"", b"\x00a"]], np.object_), "BYTES")
    return servers.infer("identity_bytes", sent).as_numpy("y").tolist()[0]


@row(
    "4.4",
    "message",
    "BYTES that are no UTF-8",
    INVALID,
    triton="differs: OK; onnxruntime's Python API takes text",
)
def _(servers: Servers) -> Any:
    return servers.send(_text(packed(b"a", b"\xff")))


@row("4.4", "message", "BYTES: no elements are no bytes", fact=([0, 1], b""))
def _(servers: Servers) -> Any:
    answer = servers.send(_text(b"", (0, 1)))
    return list(answer.outputs[0].shape), answer.raw_output_contents[0]


_refused("4.5", "fewer bytes than the shape needs", message(raw=[EIGHT[:4]]))
_refused("4.5", "more bytes than the shape needs", message(raw=[EIGHT * 2]))
_refused("4.5", "a negative dimension", message("identity_fp32", given(shape=[-1, 2])))
_refused(
    "4.5", "two negative dimensions, whose product fits", message("identity_fp32", given(shape=[-1, -2]))
)
_refused("4.5", "a shape whose product overflows to the right byte count", message(
    "identity_fp32", given(shape=[2**62 + 1, 4]), raw=[EIGHT * 2]),
    "differs: takes it, and its backend's process dies")  # fmt: skip
_refused("4.5", "a batch of 0", message(
    "batched", given("a", shape=[0, 3]), given("b", shape=[0, 3]), raw=[b"", b""]))  # fmt: skip


@row("4.5", "message", "a dimension of 0 is legal: shape [1, 0], an empty raw entry", fact=([1, 0], [b""]))
def _(servers: Servers) -> Any:
    answer = servers.send(message("identity_fp32", given(shape=[1, 0]), raw=[b""]))
    return list(answer.outputs[0].shape), list(answer.raw_output_contents)


@row("4.6", "sync", "one raw entry for each output, in their order", fact=[("sum", 12), ("difference", 12)])
def _(servers: Servers) -> Any:
    answer = _batched(servers).get_response()
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return [(output.name, len(raw)) for output, raw in pairs]


def _batched(servers: Servers, *outputs: str, **options: Any) -> Any:
    inputs = (floats(name, [[1, 2, 3]]) for name in "ab")
    asked = [triton.InferRequestedOutput(name) for name in outputs]
    return servers.infer("batched", *inputs, outputs=asked or None, **options)


def _names(answer: Any) -> list[str]:
    return [output.name for output in answer.get_response().outputs]


@row("4.7", "sync", "no outputs asked for: all of them, in the config's order", fact=["sum", "difference"])
def _(servers: Servers) -> Any:
    return _names(_batched(servers))


@row("4.7", "sync", "one output asked for: only that", fact=["difference"])
def _(servers: Servers) -> Any:
    return _names(_batched(servers, "difference"))


@row("4.7", "sync", "an output asked for twice comes once", fact=["sum"])
def _(servers: Servers) -> Any:
    return _names(_batched(servers, "sum", "sum"))


@row("4.7", "sync", "an unknown output", INVALID)
def _(servers: Servers) -> Any:
    return _batched(servers, "product")


@row("4.8", "sync", "id, model name and the concrete version are echoed", fact=("sevén", "latest", "10"))
def _(servers: Servers) -> Any:
    answer = servers.infer("latest", floats(values=[[1, 2, 3, 4]]), request_id="sevén").get_response()
    return answer.id, answer.model_name, answer.model_version


@row("4.8", "sync", "without an id the answer has none", fact="")
def _(servers: Servers) -> Any:
    return _batched(servers).get_response().id
