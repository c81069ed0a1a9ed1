"""What tritonclient sees of loads and unloads, as JSON. A process of its own: its messages have our names.

Usage: python interop_model_control.py HOST:PORT GRAPH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable


def outcome(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def answer(client: Any, model: str) -> float:
    x = triton.InferInput("x", [1, 4], "FP32")
    x.set_data_from_numpy(np.ones((1, 4), np.float32))
    value: float = client.infer(model, [x]).as_numpy("y")[0, 0].item()
    return value


def observe(client: Any, graph: bytes) -> dict[str, Any]:
    unknown = outcome(lambda: client.load_model("nope"))
    empty = outcome(lambda: client.load_model(""))
    loaded = outcome(lambda: client.load_model("a"))
    first = answer(client, "a")
    config = json.dumps({"max_batch_size": 3})
    with_files = outcome(lambda: client.load_model("a", config=config, files={"file:5/model.onnx": graph}))
    second = answer(client, "a")
    served = client.get_model_metadata("a", as_json=True)
    index = client.get_model_repository_index(as_json=True)["models"]
    return {
        "unknown": unknown,
        "empty": empty,
        "loaded": loaded,
        "with_files": with_files,
        "answers": [first, second],
        "served": [served["versions"], served["inputs"][0]["shape"]],
        "index": index,
        "files_alone": outcome(lambda: client.load_model("a", files={"file:1/model.onnx": graph})),
        "bad_config": outcome(lambda: client.load_model("a", config='{"nonsense": 1}')),
        "unload": outcome(lambda: client.unload_model("a", unload_dependents=True)),
        "unload_again": outcome(lambda: client.unload_model("a")),
        "unload_unknown": outcome(lambda: client.unload_model("nope")),
        "after": outcome(lambda: answer(client, "a")),
        "is_ready": client.is_model_ready("a"),
    }


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as connected:
        print(json.dumps(observe(connected, Path(sys.argv[2]).read_bytes())))
