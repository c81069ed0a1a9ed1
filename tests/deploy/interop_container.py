"""Ask two servers the same with tritonclient: every model's golden rows, and a text. Prints what differs.

Usage: interop_container.py MODELS URL URL. A process of its own: tritonclient brings generated code of
the same protocol, which can't be loaded beside ours.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

TYPES = {
    "bool": "BOOL",
    "float32": "FP32",
    "int32": "INT32",
    "int64": "INT64",
    "object": "BYTES",
    "uint8": "UINT8",
}
PROMPT = {
    "text_input": np.array([b"ROMEO:"], dtype=object),
    "max_tokens": np.array([20], dtype=np.int32),
    "temperature": np.array([0], dtype=np.float32),
    "stream": np.array([False]),
}


def tensors(arrays: dict[str, np.ndarray]) -> list[Any]:
    made = []
    for name, array in arrays.items():
        made.append(triton.InferInput(name, array.shape, TYPES[array.dtype.name]))
        made[-1].set_data_from_numpy(array)
    return made


def golden_rows(models: Path, model: str) -> dict[str, np.ndarray]:
    with np.load(models / model / "1" / "golden.npz") as golden:
        return {n.removeprefix("input."): golden[n] for n in golden.files if n.startswith("input.")}


def answer(client: Any, model: str, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = client.infer(model, tensors(rows), client_timeout=60)
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def text(client: Any) -> bytes:
    """What gpt_generate writes after the prompt, greedily; its answers stream."""
    pieces: list[bytes] = []
    ends: list[Any] = []

    def take(result: Any, error: Any) -> None:
        if error is not None:
            ends.append(error)
            return
        part = result.as_numpy("text_output")
        pieces.extend([] if part is None else part.ravel().tolist())
        if result.get_response().parameters["triton_final_response"].bool_param:
            ends.append(None)

    client.start_stream(take)
    client.async_stream_infer("gpt_generate", tensors(PROMPT), enable_empty_final_response=True)
    deadline = time.monotonic() + 60
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)
    client.stop_stream()
    assert ends == [None], ends
    return b"".join(pieces)


def main() -> None:
    models = Path(sys.argv[1])
    first, second = (triton.InferenceServerClient(url) for url in sys.argv[2:])
    names = sorted(path.parts[-3] for path in models.glob("*/1/golden.npz"))
    for name in names:
        if name == "gpt_generate":
            written = text(first)
            assert written == text(second)
            assert len(written.decode()) == len("ROMEO:") + 20
            continue
        rows = golden_rows(models, name)
        one, other = answer(first, name, rows), answer(second, name, rows)
        assert one.keys() == other.keys()
        for output, array in one.items():
            np.testing.assert_allclose(
                array, other[output], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {output}"
            )
    print(*names)


if __name__ == "__main__":
    main()
