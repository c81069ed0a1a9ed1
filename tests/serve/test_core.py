"""The core without a transport: repository, checks, runs, cancellation, deadlines."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serve.core import InferenceCore
from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ModelLoadError,
    NotFoundError,
    UnavailableError,
)
from serve.model_repository.repository import Repository
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, RequestedOutput, Tensor
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = 1_000_000  # multiplications of the slow model: minutes, so that only a cancellation ends it


def make_core(root: Path, **settings: Any) -> InferenceCore:
    full = ServerSettings(model_repository=(root,), **settings)
    repository = Repository(full)
    repository.load()
    return InferenceCore(full, repository)


@pytest.fixture(scope="module")
def core(repository: Path) -> Iterator[InferenceCore]:
    core = make_core(repository)
    yield core
    core.repository.close()


@pytest.fixture(scope="module")
def broken(broken_repository: Path) -> Iterator[InferenceCore]:
    core = make_core(broken_repository)
    yield core
    core.repository.close()


def fp32(name: str, array: Any) -> Tensor:
    return Tensor(name, DATATYPES["FP32"], np.array(array, np.float32))


def int64(name: str, array: Any) -> Tensor:
    return Tensor(name, DATATYPES["INT64"], np.array(array, np.int64))


def infer(core: InferenceCore, model: str, *inputs: Tensor, version: str = "", **fields: Any) -> Any:
    request = InferRequest(model, version, inputs, **fields)
    return core.infer(request, Call(), inline=True).result(60)


def wait_until_running(call: Call) -> None:
    end = time.monotonic() + 30
    while call.run_options is None:
        assert time.monotonic() < end, "the run did not start"


def test_the_latest_version_answers_by_default_and_each_by_its_number(core: InferenceCore) -> None:
    x = fp32("x", [[1, 2, 3, 4]])
    answers = {v: infer(core, "versions", x, version=v) for v in ("", "1", "2")}
    assert {v: a.model_version for v, a in answers.items()} == {"": "2", "1": "1", "2": "2"}
    np.testing.assert_array_equal(answers["1"].outputs[0].array, [[1, 2, 3, 4]])
    np.testing.assert_array_equal(answers["2"].outputs[0].array, [[2, 4, 6, 8]])


@pytest.mark.parametrize("name", list(DATATYPES))
def test_every_datatype_runs_through_a_graph(core: InferenceCore, name: str) -> None:
    datatype = DATATYPES[name]
    array = np.arange(6).reshape(2, 3)
    tensor = np.array([[b"a", b"", b"\xc3\xa9"]], object) if name == "BYTES" else array.astype(datatype.dtype)
    output = infer(core, f"identity_{name.lower()}", Tensor("x", datatype, tensor)).outputs[0]
    expected = np.array([["a", "", "é"]], object) if name == "BYTES" else tensor
    assert output.datatype is datatype
    np.testing.assert_array_equal(output.array, expected)


def test_a_scalar_has_the_empty_shape(core: InferenceCore) -> None:
    assert infer(core, "scalar", fp32("x", 2.5)).outputs[0].array.shape == ()


def test_an_empty_tensor_is_legal(core: InferenceCore) -> None:
    assert infer(core, "identity_fp32", fp32("x", np.empty((1, 0)))).outputs[0].array.shape == (1, 0)


def test_only_the_requested_outputs_come_back_each_once(core: InferenceCore) -> None:
    inputs = fp32("a", [[1, 2, 3]]), fp32("b", [[1, 1, 1]])
    wanted = RequestedOutput("difference"), RequestedOutput("difference")
    outputs = infer(core, "batched", *inputs, outputs=wanted).outputs
    assert [output.name for output in outputs] == ["difference"]
    np.testing.assert_array_equal(outputs[0].array, [[0, 1, 2]])


def test_classification_gives_labels_where_there_are_any(core: InferenceCore) -> None:
    x = fp32("x", [[0.1, 0.7, 0.2], [3, 2, 1]])
    output = infer(core, "labelled", x, outputs=(RequestedOutput("y", 2),)).outputs[0]
    assert output.array.tolist() == [
        [b"0.700000:1:dog", b"0.200000:2"],
        [b"3.000000:0:cat", b"2.000000:1:dog"],
    ]


def test_classification_without_a_batch_dimension_is_flat(core: InferenceCore) -> None:
    output = infer(core, "fixed", fp32("x", [[1, 3, 2]]), outputs=(RequestedOutput("y", 9),)).outputs[0]
    assert output.array.tolist() == [b"3.000000:1", b"2.000000:2", b"1.000000:0"]


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("fixed", [fp32("x", [[1, 2]])], r"expected shape \[1, 3\], got \[1, 2\]"),
        ("fixed", [fp32("x", [1, 2, 3])], r"expected shape \[1, 3\], got \[3\]"),
        ("fixed", [int64("x", [[1, 2, 3]])], "expected datatype FP32, got INT64"),
        ("fixed", [fp32("y", [[1, 2, 3]])], "unexpected inference input 'y' for model 'fixed'"),
        ("fixed", [], "expects each of the inputs"),
        ("fixed", [fp32("x", [[1, 2, 3]])] * 2, "expects each of the inputs"),
        (
            "batched",
            [fp32("a", np.ones((5, 3))), fp32("b", np.ones((5, 3)))],
            "batch size 5 is not in 1 to 4",
        ),
        (
            "batched",
            [fp32("a", np.ones((0, 3))), fp32("b", np.ones((0, 3)))],
            "batch size 0 is not in 1 to 4",
        ),
        ("batched", [fp32("a", np.ones((1, 3))), fp32("b", np.ones((2, 3)))], "differ in batch size"),
        ("identity_bytes", [Tensor("x", DATATYPES["BYTES"], np.array([[b"\xff"]], object))], "UTF-8"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    core: InferenceCore, model: str, inputs: list[Tensor], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        infer(core, model, *inputs)


def test_an_unknown_output_is_refused(core: InferenceCore) -> None:
    with pytest.raises(InvalidArgumentError, match="unexpected inference output 'z'"):
        infer(core, "fixed", fp32("x", [[1, 2, 3]]), outputs=(RequestedOutput("z"),))


def test_a_failing_run_is_an_internal_error_and_the_next_one_works(core: InferenceCore) -> None:
    with pytest.raises(InternalError, match="indices element out of data bounds"):
        infer(core, "gather", int64("x", [9]))
    np.testing.assert_array_equal(infer(core, "gather", int64("x", [3])).outputs[0].array, [3])


@pytest.mark.parametrize(
    ("model", "version", "error"),
    [
        ("nope", "", NotFoundError),
        ("", "", NotFoundError),
        ("fixed", "2", NotFoundError),
        ("fixed", "0", NotFoundError),
        ("fixed", "-1", InvalidArgumentError),
        ("fixed", "one", InvalidArgumentError),
        ("fixed", "²", InvalidArgumentError),
        ("fixed", "9" * 5000, InvalidArgumentError),
    ],
)
def test_unknown_models_and_versions(core: InferenceCore, model: str, version: str, error: type) -> None:
    with pytest.raises(error):
        core.repository.get(model, version)


def test_models_that_cannot_be_loaded_say_why_and_the_others_serve(broken: InferenceCore) -> None:
    problems = {
        model.name: "; ".join(model.problems.values()) for model in broken.repository.models if model.problems
    }
    expected = {
        "corrupt": "is no ONNX model",
        "missing_file": "missing_file/1/model.onnx is missing",
        "no_version": "no version folder",
        "sequence_output": "no datatype for",
        "bad_text": "config.pbtxt: 1:17",
        "unsupported_field": "'ensemble_scheduling' is not supported",
        "wrong_name": "name is 'other'",
        "wrong_type": "TYPE_INT8, the graph has TYPE_FP32",
        "wrong_shape": "the graph has [-1, 4]",
        "wrong_output": "output 'z' is not in the graph",
        "no_labels": "label file no_labels/labels.txt is missing",
    }
    assert problems.keys() == expected.keys()
    for name, text in expected.items():
        assert text in problems[name]
        assert not broken.repository.is_ready(name)
    assert infer(broken, "good", fp32("x", [[1, 2, 3, 4]])).outputs[0].array.tolist() == [[1, 2, 3, 4]]
    assert not broken.is_ready()


def test_a_version_that_failed_is_unavailable_a_model_without_any_not_found(broken: InferenceCore) -> None:
    with pytest.raises(UnavailableError, match="version 1 is not at ready state"):
        broken.repository.get("corrupt", "1")
    with pytest.raises(NotFoundError, match="has no available versions"):
        broken.repository.get("corrupt")


def test_readiness_that_is_not_strict_waits_for_no_model(broken_repository: Path) -> None:
    core = make_core(broken_repository, strict_readiness=False)
    assert core.is_ready()
    core.repository.close()


def test_a_link_that_leads_outside_the_repository_is_not_followed(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "models" / "linked").mkdir(parents=True)
    (tmp_path / "models" / "linked" / "1").symlink_to(repository / "fixed" / "1")
    other = Repository(ServerSettings(model_repository=(tmp_path / "models",)))
    other.load()
    assert "leads outside the model repository" in other.models[0].problems[1]


def test_a_model_given_as_repository_is_pointed_to_its_parent(repository: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a model, not a model repository: give its parent"):
        Repository(ServerSettings(model_repository=(repository / "fixed",))).load()


def test_a_name_in_two_repositories_is_reported(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "fixed" / "1").mkdir(parents=True)
    both = Repository(ServerSettings(model_repository=(repository, tmp_path)))
    both.load()
    fixed = next(model for model in both.models if model.name == "fixed")
    assert "earlier model repository" in str(fixed.problems[None])
    both.close()


@pytest.mark.parametrize("inline", [True, False])
def test_cancelling_ends_a_run(core: InferenceCore, *, inline: bool) -> None:
    call = Call(time.monotonic() + 60)
    request = InferRequest("slow", "", (int64("n", LONG),))
    canceller = _cancel_when_running(call)
    started = time.monotonic()
    with pytest.raises(CanceledError):
        core.infer(request, call, inline=inline).result(60)
    canceller.join()
    assert time.monotonic() - started < 30


def _cancel_when_running(call: Call) -> threading.Thread:
    def cancel() -> None:
        wait_until_running(call)
        call.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    return thread


def test_waiting_requests_are_cancelled_and_expire_without_a_run(repository: Path) -> None:
    core = make_core(repository)
    slow = [Call(), Call()]
    running = [core.infer(InferRequest("slow", "", (int64("n", LONG),)), call) for call in slow]
    for call in slow:
        wait_until_running(call)
    cancelled, expired = Call(), Call(deadline=time.monotonic())
    waiting = [core.infer(InferRequest("slow", "", (int64("n", 1),)), call) for call in (cancelled, expired)]
    version = core.repository.get("slow")
    assert version.pending == 2
    cancelled.cancel()
    with pytest.raises(CancelledError):
        waiting[0].result(60)
    for call in slow:
        call.cancel()
    with pytest.raises(DeadlineExceededError, match="passed while it waited"):
        waiting[1].result(60)
    for future in running:
        with pytest.raises(CanceledError):
            future.result(60)
    core.repository.close()
    counts = version.statistics.snapshot()
    assert (counts.requests.count, counts.failure) == (
        0,
        {"REJECTED": 1, "CANCELED": 3, "BACKEND": 0, "OTHER": 0},
    )


def test_closing_answers_what_waits(repository: Path) -> None:
    core = make_core(repository)
    calls = [core.infer(InferRequest("slow", "", (int64("n", 10),)), Call()) for _ in range(20)]
    core.repository.close()
    assert all(call.done() and not call.exception() for call in calls)


def test_statistics_count_exactly(repository: Path) -> None:
    core = make_core(repository)
    for batch in (1, 3, 4):
        rows = np.ones((batch, 3))
        infer(core, "batched", fp32("a", rows), fp32("b", rows))
    with pytest.raises(InvalidArgumentError):
        infer(core, "batched")
    with pytest.raises(InternalError):
        infer(core, "gather", int64("x", [9]))
    assert core.repository.get("gather").statistics.snapshot().failure["BACKEND"] == 1
    counts = core.repository.get("batched").statistics.snapshot()
    assert (counts.requests.count, counts.inferences, counts.executions) == (3, 8, 3)
    assert counts.failure["OTHER"] == 1
    compute = counts.requests
    parts = counts.queue_ns + compute.input_ns + compute.infer_ns + compute.output_ns
    assert parts == counts.request_ns > 0
    core.repository.close()
