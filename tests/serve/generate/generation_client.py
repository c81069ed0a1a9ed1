"""A client of generation models over our own stubs, and what a graph answers without any server."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
import onnxruntime

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TYPES: dict[str, tuple[str, Any]] = {
    "input_ids": ("INT64", np.int64),
    "max_tokens": ("INT32", np.int32),
    "top_k": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "repetition_penalty": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "stream": ("BOOL", np.bool_),
    "ignore_eos": ("BOOL", np.bool_),
    "exclude_input_in_output": ("BOOL", np.bool_),
    "return_finish_reason": ("BOOL", np.bool_),
    "return_num_input_tokens": ("BOOL", np.bool_),
    "return_num_output_tokens": ("BOOL", np.bool_),
}


def ask(model: str, *, id: str = "", outputs: tuple[str, ...] = (), **fields: Any) -> pb.ModelInferRequest:  # noqa: A002 - the protocol's
    """A request; greedy unless it says otherwise."""
    message = pb.ModelInferRequest(model_name=model, id=id)
    for name, value in {"temperature": 0.0, **fields}.items():
        if name in _TYPES:
            datatype, dtype = _TYPES[name]
            array = np.atleast_1d(np.asarray(value, dtype))
            data, shape = array.tobytes(), array.shape
        else:
            texts = [text.encode() for text in ([value] if isinstance(value, str) else value)]
            data = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
            datatype, shape = "BYTES", (len(texts),)
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(data)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def output(response: pb.ModelInferResponse, name: str) -> Any:
    """An output's elements; texts as str, which half a character can't be."""
    index = [tensor.name for tensor in response.outputs].index(name)
    data, tensor = response.raw_output_contents[index], response.outputs[index]
    if tensor.datatype == "BYTES":
        assert tensor.shape == [1]
        assert int.from_bytes(data[:4], "little") == len(data) - 4
        return data[4:].decode()
    return np.frombuffer(data, {"INT64": np.int64, "UINT32": np.uint32}[tensor.datatype]).tolist()


def is_final(response: pb.ModelInferResponse) -> bool:
    final: bool = response.parameters["triton_final_response"].bool_param
    return final


class Stream:
    """A ModelStreamInfer call."""

    def __init__(self, stub: Any, *requests: pb.ModelInferRequest, **options: Any) -> None:
        self._requests: queue.Queue[pb.ModelInferRequest | None] = queue.Queue()
        for request in requests:
            self._requests.put(request)
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()
        self._requests.put(None)

    def half_close(self) -> None:
        self._requests.put(None)

    def __iter__(self) -> Iterator[pb.ModelInferResponse]:
        """The answers up to the last one of a request.

        Raises:
            AssertionError: one is an error.
        """
        while True:
            answer = next(self.call)
            assert not answer.error_message, answer.error_message
            yield answer.infer_response
            if is_final(answer.infer_response):
                return

    def text(self) -> str:
        """All text of one request."""
        return "".join(output(response, "text_output") for response in self)


def stub_of(url: str) -> tuple[grpc.Channel, Any]:
    """A connection of its own."""
    channel = grpc.insecure_channel(url, (("grpc.use_local_subchannel_pool", 1),))
    return channel, GRPCInferenceServiceStub(channel)


def greedy(graph: Path, prompt: list[int], count: int, cache: int = 512) -> list[int]:
    """The likeliest tokens after a prompt, one run of the graph at a time and nothing shared."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options)
    names = [node.name for node in session.get_outputs()]
    past = {
        node.name: np.zeros((1, node.shape[1], cache, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values")
    }
    new, length, found = prompt, 0, []
    for _ in range(count):
        feeds = {"input_ids": np.array([new]), "past_length": np.array([[length]]), **past}
        answer = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: answer[name.replace("past_key_values", "present")] for name in past}
        length += len(new)
        new = [int(answer["logits"][0, -1].argmax())]
        found += new
    return found
