"""What goes wrong for one request stays with that one, and nothing of it stays in memory."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from serve.core import InferenceCore
from serve.errors import CanceledError, InvalidArgumentError, ModelLoadError
from serve.model_repository.repository import Repository
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, RequestedOutput, Tensor
from serve.runtime.session import Session, SessionSettings
from serve.scheduling.executor import Executor
from serve.scheduling.scheduler import DefaultScheduler, QueuedRequest
from serve.settings import ServerSettings
from tests.graphs import identity, info, slow, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from serve.request import InferResponse
    from serve.scheduling.scheduler import Decision

SUMS = """
max_batch_size: 4
sequence_batching {
  oldest { max_candidate_sequences: 8 preferred_batch_size: [2] max_queue_delay_microseconds: 60000000 }
  state { input_name: "state" output_name: "new" data_type: TYPE_FP32 dims: [1] }
}
"""
LONG = 1_000_000


def running_sum() -> onnx.GraphProto:
    """y = new = x + state, and the same as text, which has no classes."""
    nodes = [
        helper.make_node("Add", ["x", "state"], ["new"]),
        helper.make_node("Identity", ["new"], ["y"]),
        helper.make_node("Cast", ["new"], ["text"], to=TensorProto.STRING),
    ]
    inputs = [info("x", ["n", 1]), info("state", ["n", 1])]
    outputs = [info("y", ["n", 1]), info("new", ["n", 1]), info("text", ["n", 1], TensorProto.STRING)]
    return helper.make_graph(nodes, "running_sum", inputs, outputs)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceCore]:
    root = tmp_path_factory.mktemp("faults")
    write_model(root / "sums", running_sum())
    (root / "sums" / "config.pbtxt").write_text(SUMS)
    write_model(root / "echo", identity(["n", "width"]))
    delay = "dynamic_batching { preferred_batch_size: 2 max_queue_delay_microseconds: 60000000 }"
    (root / "echo" / "config.pbtxt").write_text(f"max_batch_size: 4 {delay}")
    write_model(root / "slow", slow())
    (root / "slow" / "config.pbtxt").write_text("instance_group { count: 1 }")
    settings = ServerSettings(model_repository=(root,))
    repository = Repository(settings)
    repository.load()
    made = InferenceCore(settings, repository)
    assert made.is_ready(), repository.index()
    yield made
    made.close()


def fp32(*rows: Any) -> Tensor:
    return Tensor("x", DATATYPES["FP32"], np.array(rows, np.float32))


def times(count: int) -> Tensor:
    return Tensor("n", DATATYPES["INT64"], np.array(count, np.int64))


def add(
    core: InferenceCore, sequence: int, *outputs: RequestedOutput, **flags: bool
) -> Future[InferResponse]:
    parameters = {"sequence_id": sequence, **{f"sequence_{name}": flag for name, flag in flags.items()}}
    return core.infer(InferRequest("sums", "", (fp32([1]),), outputs, parameters=parameters), Call())


def total(future: Future[InferResponse]) -> float:
    answers = {tensor.name: tensor.array for tensor in future.result(30).outputs}
    return float(answers["y"][0, 0])


def test_a_request_that_fails_leaves_its_sequence_and_its_neighbours_as_they_were(
    core: InferenceCore,
) -> None:
    impossible = RequestedOutput("text", classification=1)
    first = [add(core, 1, start=True), add(core, 2, start=True)]
    assert [total(future) for future in first] == [1, 1]
    bad, good = add(core, 1, impossible), add(core, 2)
    with pytest.raises(InvalidArgumentError, match="classification of BYTES"):
        bad.result(30)
    assert total(good) == 2
    third = [add(core, 1), add(core, 2)]
    assert [total(future) for future in third] == [2, 3]
    bad, good = add(core, 1, impossible), add(core, 2, end=True)
    with pytest.raises(InvalidArgumentError):
        bad.result(30)
    assert total(good) == 4


def send_and_forget(core: InferenceCore) -> list[weakref.ref[Any]]:
    """Two requests that share a run; what was made for them."""
    requests = [InferRequest("echo", "", (fp32([i] * 8),)) for i in range(2)]
    futures = [core.infer(request, Call()) for request in requests]
    arrays = [request.inputs[0].array for request in requests]
    arrays += [future.result(30).outputs[0].array for future in futures]
    return [weakref.ref(made) for made in (*arrays, *futures)]


def test_a_request_that_waited_is_freed_without_the_garbage_collector(core: InferenceCore) -> None:
    send_and_forget(core)
    gc.collect()
    gc.disable()
    try:
        left = send_and_forget(core)
        # The instance thread holds its last batch until it looks for the next one.
        end = threading.Event()
        for _ in range(3000):
            if not any(reference() is not None for reference in left):
                break
            end.wait(0.01)
        assert [reference() for reference in left] == [None] * len(left)
    finally:
        gc.enable()


def test_a_cancelled_run_is_settled_at_once(core: InferenceCore) -> None:
    calls = [Call(), Call()]
    running = core.infer(InferRequest("slow", "", (times(LONG),)), calls[0])
    while not running.running():
        pass
    calls[0].cancel()
    with pytest.raises(CanceledError):
        running.result(0)


def test_a_cancel_before_the_model_has_the_request_counts(core: InferenceCore) -> None:
    call = Call()
    call.cancel()
    future = core.infer(InferRequest("echo", "", (fp32([1]),)), call)
    with pytest.raises(CancelledError):
        future.result(30)


class FaultyScheduler(DefaultScheduler):
    """Fails once."""

    faults = 1

    def next(self, now: float) -> Decision:
        if len(self) and self.faults:
            self.faults -= 1
            raise RuntimeError("a fault")
        return super().next(now)


def test_a_fault_of_the_scheduler_does_not_end_its_thread() -> None:
    answered: list[QueuedRequest] = []
    done = threading.Event()

    def run(batch: Sequence[QueuedRequest]) -> None:
        answered.extend(batch)
        done.set()

    executor = Executor("faulty", 1, FaultyScheduler(), run, lambda _, error: pytest.fail(str(error)))
    queued = QueuedRequest(InferRequest("m", "", ()), Call(), Future())
    executor.submit(queued, inline=False)
    assert done.wait(30)
    executor.close()
    assert answered == [queued]


def test_a_graph_of_bf16_and_strings_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["a"], ["b"]), helper.make_node("Identity", ["s"], ["t"])]
    tensors = [info("a", ["n"], TensorProto.BFLOAT16), info("s", ["n"], TensorProto.STRING)]
    results = [info("b", ["n"], TensorProto.BFLOAT16), info("t", ["n"], TensorProto.STRING)]
    path = write_model(tmp_path / "m", helper.make_graph(nodes, "mixed", tensors, results))
    with pytest.raises(ModelLoadError, match="BF16 tensors and an input of strings"):
        Session(path, SessionSettings())
