"""Sequences through tritonclient, as JSON. A process of its own: its protobuf messages have our names.

Usage: python interop_sequences.py HOST:PORT sync|stream MODEL AT_ONCE < INPUTS
       python interop_sequences.py HOST:PORT refusals|backlog|vanish MODEL
"""

from __future__ import annotations

import json
import queue
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable

Answers = list[list[Any]]


def tensor(row: list[float]) -> Any:
    made = triton.InferInput("x", [1, len(row)], "FP32")
    made.set_data_from_numpy(np.array([row], np.float32))
    return made


def flags(sequences: list[Any], sequence: int, step: int) -> dict[str, Any]:
    return {
        "sequence_start": step == 0,
        "sequence_end": step == len(sequences[sequence]) - 1,
        "request_id": f"{sequence} {step}",
    }


def sync(client: Any, model: str, at_once: int, sequences: list[Any]) -> Answers:
    """Each sequence from a thread that waits for each answer, ids are numbers."""

    def one(sequence: int) -> list[Any]:
        return [
            client.infer(
                model, [tensor(row)], sequence_id=sequence + 1, **flags(sequences, sequence, step)
            ).as_numpy("y")[0].tolist()
            for step, row in enumerate(sequences[sequence])
        ]  # fmt: skip

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, range(len(sequences))))


def stream(client: Any, model: str, at_once: int, sequences: list[Any]) -> Answers:
    """All of one stream, step by step through `at_once` sequences without waiting, ids are texts."""
    answers: Answers = [[None] * len(sequence) for sequence in sequences]
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)))
    for first in range(0, len(sequences), at_once):
        group = range(first, min(first + at_once, len(sequences)))
        longest = max(len(sequences[sequence]) for sequence in group)
        sent = [(s, step) for step in range(longest) for s in group if step < len(sequences[s])]
        for sequence, step in sent:
            client.async_stream_infer(
                model, [tensor(sequences[sequence][step])], sequence_id=f"sequence {sequence}",
                **flags(sequences, sequence, step),
            )  # fmt: skip
        for _ in sent:
            result, error = done.get(timeout=60)
            if error is not None:
                raise error
            sequence, step = map(int, result.get_response().id.split())
            answers[sequence][step] = result.as_numpy("y")[0].tolist()
    client.stop_stream()
    return answers


def refusal(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def refusals(client: Any, model: str) -> dict[str, Any]:
    x = [tensor([1, 2, 3])]
    two = triton.InferInput("x", [2, 3], "FP32")
    two.set_data_from_numpy(np.ones((2, 3), np.float32))
    state = triton.InferInput("h", [1, 1, 8], "FP32")
    state.set_data_from_numpy(np.ones((1, 1, 8), np.float32))
    start = {"sequence_id": 900, "sequence_start": True}
    return {
        "no_id": refusal(lambda: client.infer(model, x)),
        "no_start": refusal(lambda: client.infer(model, x, sequence_id=901)),
        "two_rows": refusal(lambda: client.infer(model, [two], **start)),
        "state": refusal(lambda: client.infer(model, [*x, state], **start)),
        "kept_output": refusal(
            lambda: client.infer(model, x, outputs=[triton.InferRequestedOutput("h_out")], **start)
        ),
        "after_the_end": [
            refusal(lambda: client.infer(model, x, sequence_id=902, sequence_start=True, sequence_end=True)),
            refusal(lambda: client.infer(model, x, sequence_id=902)),
        ],
        "metadata": client.get_model_metadata(model, as_json=True),
        "config": client.get_model_config(model, as_json=True)["config"]["sequence_batching"],
    }


def backlog(client: Any, model: str) -> list[str]:
    """A sequence that waits too long for the only slot, which another one has."""
    x = [tensor([1, 2, 3])]
    client.infer(model, x, sequence_id=1, sequence_start=True)
    refused = refusal(lambda: client.infer(model, x, sequence_id=2, sequence_start=True, timeout=50_000))
    client.infer(model, x, sequence_id=1, sequence_end=True)
    return refused


def vanish(client: Any, model: str) -> None:
    """Begin sequences, as many as there may be, and wait to be killed with a stream open."""
    x = [tensor([1, 2, 3])]
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put((result, error)))
    for sequence in range(1, 11):
        client.infer(model, x, sequence_id=sequence, sequence_start=True)
        client.async_stream_infer(model, x, sequence_id=sequence + 10, sequence_start=True)
        assert done.get(timeout=60)[1] is None
    too_many = refusal(lambda: client.infer(model, x, sequence_id=21, sequence_start=True))
    print(json.dumps(too_many), flush=True)
    signal.pause()


if __name__ == "__main__":
    url, mode, name, *rest = sys.argv[1:]
    with triton.InferenceServerClient(url) as connected:
        if mode == "vanish":
            vanish(connected, name)
        elif mode in {"refusals", "backlog"}:
            print(json.dumps((refusals if mode == "refusals" else backlog)(connected, name)))
        else:
            ask = sync if mode == "sync" else stream
            print(json.dumps(ask(connected, name, int(rest[0]), json.load(sys.stdin))))
