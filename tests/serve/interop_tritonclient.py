"""What tritonclient sees of a server, as JSON. A process of its own: its protobuf messages have our names.

Usage: python interop_tritonclient.py HOST:PORT
"""

from __future__ import annotations

import json
import queue
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip


def tensor(name: str, array: np.ndarray, datatype: str) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def refusal(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def observe(client: Any) -> dict[str, Any]:
    metadata = client.get_model_metadata("versions", as_json=True)
    x = tensor("x", np.array([[1, 2, 3, 4]], np.float32), "FP32")
    wrong = tensor("x", np.ones((1, 9), np.float32), "FP32")
    result = client.infer("versions", [x], model_version="1", request_id="seven")
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("fixed"),
        "version_ready": client.is_model_ready("versions", "2"),
        "unknown_ready": client.is_model_ready("nope"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": metadata,
        "datatypes": {name: echoes(client, name, dtype) for name, dtype in DTYPES.items()},
        "text": echo(client, "identity_bytes", np.array([["héé".encode(), b""]], object), "BYTES"),
        "answer": result.as_numpy("y").tolist(),
        "response": [result.get_response().model_version, result.get_response().id],
        "outputs": requested_outputs(client),
        "classes": classes(client),
        "async": asynchronous(client, x),
        "compressed": client.infer("versions", [x], compression_algorithm="gzip").as_numpy("y").tolist(),
        "unknown_model": refusal(lambda: client.infer("nope", [x])),
        "unknown_version": refusal(lambda: client.infer("versions", [x], model_version="9")),
        "bad_version": refusal(lambda: client.infer("versions", [x], model_version="x")),
        "wrong_shape": refusal(lambda: client.infer("versions", [wrong])),
        "missing_input": refusal(lambda: client.infer("versions", [])),
        "unknown_output": refusal(
            lambda: client.infer("versions", [x], outputs=[triton.InferRequestedOutput("z")])
        ),
        "too_late": refusal(lambda: client.infer("slow", [long_run()], client_timeout=0.2)),
        "unknown_metadata": refusal(lambda: client.get_model_metadata("nope")),
        "config": client.get_model_config("labelled", as_json=True)["config"],
        "index": client.get_model_repository_index(as_json=True)["models"],
        "statistics": statistics(client),
        "unknown_config": refusal(lambda: client.get_model_config("nope")),
        "unknown_statistics": refusal(lambda: client.get_inference_statistics("nope")),
        "sequence_flags": refusal(lambda: client.infer("versions", [x], sequence_id=5, sequence_start=True)),
    }


def echo(client: Any, model: str, array: np.ndarray, datatype: str) -> Any:
    values = client.infer(model, [tensor("x", array, datatype)]).as_numpy("y").tolist()
    return [[v.decode() if isinstance(v, bytes) else v for v in row] for row in values]


def echoes(client: Any, name: str, dtype: Any) -> bool:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    answer = client.infer(f"identity_{name.lower()}", [tensor("x", array, name)]).as_numpy("y")
    return bool(np.array_equal(np.asarray(answer, np.float64), array.astype(np.float64)))


def long_run() -> Any:
    return tensor("n", np.array(1_000_000, np.int64).reshape(()), "INT64")


def requested_outputs(client: Any) -> list[Any]:
    inputs = [tensor(name, np.ones((2, 3), np.float32), "FP32") for name in ("a", "b")]
    result = client.infer("batched", inputs, outputs=[triton.InferRequestedOutput("sum")])
    return [[output.name for output in result.get_response().outputs], result.as_numpy("sum").tolist()]


def classes(client: Any) -> list[Any]:
    x = tensor("x", np.array([[0.25, 0.5, 0.125]], np.float32), "FP32")
    wanted = [triton.InferRequestedOutput("y", class_count=2)]
    answer = client.infer("labelled", [x], outputs=wanted).as_numpy("y")
    return [[text.decode() for text in row] for row in answer]


def statistics(client: Any) -> Any:
    """What three requests of one row and one of two rows add to a model's statistics."""
    for rows in (1, 1, 2, 1):
        client.infer("labelled", [tensor("x", np.ones((rows, 3), np.float32), "FP32")])
    refusal(lambda: client.infer("labelled", []))
    return client.get_inference_statistics("labelled", as_json=True)["model_stats"][0]


def asynchronous(client: Any, x: Any) -> Any:
    done: queue.Queue[Any] = queue.Queue()
    client.async_infer("versions", [x], lambda result, error: done.put((result, error)))
    result, error = done.get(timeout=30)
    return str(error) if error else result.as_numpy("y").tolist()


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as connected:
        print(json.dumps(observe(connected)))
