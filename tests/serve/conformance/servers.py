"""The servers that the rows ask, and how: by tritonclient, by its messages where its API is too kind."""

from __future__ import annotations

import queue
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DEADLINE = 30.0
SERVICE = "/inference.GRPCInferenceService/"


class Servers:
    """By name: `served` loads all it finds, `controlled` what it is told, `restricted` wants a header."""

    def __init__(self, addresses: dict[str, dict[str, Any]]) -> None:
        self.addresses = addresses
        self.clients = {name: triton.InferenceServerClient(a["url"]) for name, a in addresses.items()}
        self.channels: dict[str, Any] = {
            name: grpc.insecure_channel(a["url"]) for name, a in addresses.items()
        }
        self.client = self.clients["served"]
        self.controlled = self.clients["controlled"]
        self.restricted = self.clients["restricted"]

    def stub(self, name: str = "served") -> Any:
        return service_pb2_grpc.GRPCInferenceServiceStub(self.channels[name])

    def infer(self, model: str, *inputs: Any, **options: Any) -> Any:
        return self.client.infer(model, list(inputs), **options)

    def send(self, message: Any, name: str = "served") -> Any:
        return self.stub(name).ModelInfer(message, timeout=DEADLINE)

    def pending(self, model: str) -> int:
        """How many requests wait for a model, by the metrics."""
        with urllib.request.urlopen(  # noqa: S310 - the test's own server
            self.addresses["served"]["metrics"], timeout=DEADLINE
        ) as answer:
            lines = answer.read().decode().splitlines()
        start = "nv_inference_pending_request_count{"
        found = [line for line in lines if line.startswith(start) and f'model="{model}"' in line]
        return int(float(found[0].split()[-1]))


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it never became so")
        time.sleep(0.002)


def tensor(name: str, values: Any, datatype: str) -> Any:
    array = np.asarray(values)
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def floats(name: str = "x", values: Any = ((1, 2),)) -> Any:
    return tensor(name, np.asarray(values, np.float32), "FP32")


def count(n: int) -> Any:
    """The input of the slow models: 10 to 100 µs each."""
    return tensor("n", np.array([[n]], np.int64), "INT64")


def status(call: Callable[[], Any]) -> str:
    """The status code of a call that a row makes beside its own."""
    try:
        call()
    except InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode.")
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def parameter(value: Any) -> Any:
    if isinstance(value, pb.InferParameter):
        return value
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    if isinstance(value, float):
        return pb.InferParameter(double_param=value)
    return pb.InferParameter(string_param=value)


def put(target: Any, parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        target[name].CopyFrom(parameter(value))


def given(
    name: str = "x",
    datatype: str = "FP32",
    shape: Iterable[int] = (1, 2),
    contents: Any = None,
    **parameters: Any,
) -> Any:
    """An input of a message; `contents` are InferTensorContents' fields."""
    made = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents is not None:
        made.contents.CopyFrom(pb.InferTensorContents(**contents))
    put(made.parameters, parameters)
    return made


def wanted(name: str, **parameters: Any) -> Any:
    """A requested output of a message."""
    made = pb.ModelInferRequest.InferRequestedOutputTensor(name=name)
    put(made.parameters, parameters)
    return made


EIGHT = np.array([1, 2], np.float32).tobytes()


def message(
    model: str = "identity_fp32",
    *inputs: Any,
    raw: Iterable[bytes] | None = None,
    outputs: Iterable[Any] = (),
    **fields: Any,
) -> Any:
    """A ModelInferRequest; without inputs x is [[1, 2]], and fields that it doesn't have are parameters."""
    made = pb.ModelInferRequest(model_name=model, outputs=outputs)
    made.inputs.extend(inputs or [given()])
    has_contents = any(each.HasField("contents") for each in made.inputs)
    made.raw_input_contents.extend([EIGHT] if raw is None and not has_contents else raw or ())
    made.id = fields.pop("id", "")
    made.model_version = fields.pop("version", "")
    put(made.parameters, fields)
    return made


class Calls:
    """Requests without waiting, and their answers as they come."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._done: queue.Queue[tuple[str, Any, Any]] = queue.Queue()
        self._sent = 0

    def send(self, model: str, *inputs: Any, name: str = "", **options: Any) -> Any:
        self._sent += 1
        return self._client.async_infer(
            model, list(inputs), lambda result, error: self._done.put((name, result, error)), **options
        )

    def next(self) -> tuple[str, str, Any]:
        """The next answer: the request's name, its status, the result or the error."""
        name, result, error = self._done.get(timeout=DEADLINE)
        self._sent -= 1
        code = "OK" if error is None else str(error.status()).removeprefix("StatusCode.")
        return name, code, error or result

    @property
    def ready(self) -> bool:
        """Whether an answer is there."""
        return not self._done.empty()

    def rest(self) -> list[tuple[str, str]]:
        return [self.next()[:2] for _ in range(self._sent)]


def occupy(client: Any, n: int) -> Calls:
    """Have the one instance of the model `slow` run with n; it does so when this returns."""
    calls = Calls(client)
    calls.send("slow", count(n))
    eventually(
        lambda: status(lambda: client.infer("slow", [count(1)], client_timeout=0.05)) == "DEADLINE_EXCEEDED"
    )
    return calls


def stream(servers: Servers, messages: Iterable[Any], **options: Any) -> list[Any]:
    """A stream of messages, closed by the client after the last; all its responses."""
    return list(servers.stub().ModelStreamInfer(iter(list(messages)), timeout=DEADLINE, **options))
