"""Requests that share a run: what each of them gets, whatever the others do."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from serve.core import InferenceCore
from serve.errors import InternalError, InvalidArgumentError, ModelLoadError
from serve.model_repository.repository import Repository
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, RequestedOutput, Tensor
from serve.settings import ServerSettings
from tests.graphs import FLOAT, addition, gather, identity, info, scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from serve.request import InferResponse

INT64 = TensorProto.INT64
# Nothing runs before four rows wait: the tests decide what a batch is made of.
FOUR = "max_batch_size: 8 dynamic_batching { preferred_batch_size: 4 max_queue_delay_microseconds: 60000000 }"


def masked_sum() -> onnx.GraphProto:
    """total[n] = Σ values·mask over time, and doubled [n, time] = 2·values."""
    two = helper.make_tensor("two", FLOAT, [], [2.0])
    axis = helper.make_tensor("axis", INT64, [1], [1])
    nodes = [
        helper.make_node("Mul", ["values", "mask"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis"], ["total"], keepdims=0),
        helper.make_node("Mul", ["values", "two"], ["doubled"]),
    ]
    inputs = [info("values", ["n", "time"]), info("mask", ["n", "time"])]
    outputs = [info("total", ["n"]), info("doubled", ["n", "time"])]
    return helper.make_graph(nodes, "masked_sum", inputs, outputs, [two, axis])


LENGTHS = """
parameters { key: "length_axis" value { string_value: "values:1,mask:1,doubled:1" } }
parameters { key: "length_mask" value { string_value: "mask" } }
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batching")
    for name, graph, config in (
        ("scaled", scaled(2), FOUR),
        ("gather", gather(), FOUR),
        ("addition", addition(), FOUR),
        ("any_width", identity(["n", "width"]), FOUR),
        ("masked_sum", masked_sum(), FOUR + LENGTHS),
        ("buckets", masked_sum(), FOUR + LENGTHS + _parameter("length_buckets", "3,6")),
        ("ordered", identity(["n", "width"]), FOUR.replace("{", "{ preserve_ordering: true", 1)),
        ("flat", identity(["n"]), "max_batch_size: 8 " + _reshaped(1, "") + FOUR.split("8", 1)[1]),
        ("alone", scaled(2), "max_batch_size: 8"),
    ):
        write_model(root / name, graph)
        (root / name / "config.pbtxt").write_text(config)
    return root


def _parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


def _reshaped(dims: int, shape: str) -> str:
    tensors = (("input", "x"), ("output", "y"))
    return "".join(
        f'{role} {{ name: "{name}" data_type: TYPE_FP32 dims: {dims} reshape {{ shape: [{shape}] }} }} '
        for role, name in tensors
    )


@pytest.fixture(scope="module")
def core(root: Path) -> Iterator[InferenceCore]:
    settings = ServerSettings(model_repository=(root,))
    repository = Repository(settings)
    repository.load()
    core = InferenceCore(settings, repository)
    assert core.is_ready(), repository.index()
    yield core
    core.close()


def fp32(name: str, *rows: Any) -> Tensor:
    return Tensor(name, DATATYPES["FP32"], np.array(rows, np.float32))


def send(
    core: InferenceCore, model: str, *inputs: Tensor, **fields: Any
) -> tuple[Call, Future[InferResponse]]:
    call = Call()
    return call, core.infer(InferRequest(model, "", inputs, **fields), call)


def batches(core: InferenceCore, model: str) -> dict[int, int]:
    """Rows of a run to the runs of so many rows, so far."""
    counts = core.repository.get(model).statistics.snapshot()
    return {rows: batch.count for rows, batch in counts.batches.items()}


def new_batches(core: InferenceCore, model: str, before: dict[int, int]) -> dict[int, int]:
    now = batches(core, model)
    return {rows: count - before.get(rows, 0) for rows, count in now.items() if count != before.get(rows, 0)}


def outputs(future: Future[InferResponse]) -> dict[str, list[Any]]:
    return {tensor.name: tensor.array.tolist() for tensor in future.result(30).outputs}


def test_requests_share_a_run_and_each_gets_its_rows(core: InferenceCore) -> None:
    before = batches(core, "scaled")
    sent = [send(core, "scaled", fp32("x", [i] * 4), id=str(i)) for i in range(3)]
    assert core.repository.get("scaled").pending == 3
    sent.append(send(core, "scaled", fp32("x", [3] * 4), id="3"))
    for i, (_, future) in enumerate(sent):
        answer = future.result(30)
        assert (answer.id, answer.outputs[0].array.tolist()) == (str(i), [[2.0 * i] * 4])
    assert new_batches(core, "scaled", before) == {4: 1}


def test_requests_of_several_rows_share_a_run(core: InferenceCore) -> None:
    before = batches(core, "scaled")
    sent = [send(core, "scaled", fp32("x", *[[i] * 4] * rows)) for i, rows in enumerate((1, 3))]
    assert [outputs(future)["y"] for _, future in sent] == [[[0.0] * 4], [[2.0] * 4] * 3]
    assert new_batches(core, "scaled", before) == {4: 1}


def test_a_cancelled_request_harms_no_other(core: InferenceCore) -> None:
    before = batches(core, "scaled")
    sent = [send(core, "scaled", fp32("x", [i] * 4)) for i in range(3)]
    sent[1][0].cancel()
    assert core.repository.get("scaled").pending == 2
    sent += [send(core, "scaled", fp32("x", [i] * 4)) for i in (3, 4)]
    with pytest.raises(CancelledError):
        sent[1][1].result(30)
    answers = [outputs(future)["y"][0][0] for i, (_, future) in enumerate(sent) if i != 1]
    assert answers == [0, 4, 6, 8]
    assert new_batches(core, "scaled", before) == {4: 1}


def test_a_request_that_fails_in_a_batch_harms_no_other(core: InferenceCore) -> None:
    before = batches(core, "gather")
    indexes = [1, 9, 2, 3]
    sent = [send(core, "gather", Tensor("x", DATATYPES["INT64"], np.array([i]))) for i in indexes]
    with pytest.raises(InternalError, match="out of data bounds"):
        sent[1][1].result(30)
    assert [outputs(sent[i][1])["y"] for i in (0, 2, 3)] == [[1.0], [2.0], [3.0]]
    assert new_batches(core, "gather", before) == {1: 3}
    assert core.repository.get("gather").statistics.snapshot().failure["BACKEND"] == 1


def test_each_request_gets_the_outputs_that_it_names(core: InferenceCore) -> None:
    pairs = (fp32("a", [3, 2, 1]), fp32("b", [1, 1, 1]))
    swapped = pairs[::-1]
    wanted = [(), (RequestedOutput("difference"),), (RequestedOutput("sum", classification=1),), ()]
    sent = [
        send(core, "addition", *(swapped if i == 3 else pairs), outputs=named)
        for i, named in enumerate(wanted)
    ]
    both = {"sum": [[4.0, 3.0, 2.0]], "difference": [[2.0, 1.0, 0.0]]}
    answers = [outputs(future) for _, future in sent]
    assert answers == [both, {"difference": both["difference"]}, {"sum": [[b"4.000000:0"]]}, both]


def test_shapes_are_never_mixed(core: InferenceCore) -> None:
    before = batches(core, "any_width")
    widths = [1, 2, 1, 2, 1, 2, 1, 2]
    sent = [send(core, "any_width", fp32("x", list(range(width)))) for width in widths]
    assert [outputs(future)["y"] for _, future in sent] == [[[*map(float, range(width))]] for width in widths]
    assert new_batches(core, "any_width", before) == {4: 2}


@pytest.mark.parametrize(("model", "lengths"), [("masked_sum", (5, 8, 6, 7)), ("buckets", (1, 3, 2, 3))])
def test_lengths_of_one_bucket_share_a_run_where_a_mask_hides_the_padding(
    core: InferenceCore, model: str, lengths: tuple[int, ...]
) -> None:
    before = batches(core, model)
    sent = [
        send(core, model, fp32("values", [1.5] * length), fp32("mask", [1] * length)) for length in lengths
    ]
    assert [outputs(future) for _, future in sent] == [
        {"total": [1.5 * length], "doubled": [[3.0] * length]} for length in lengths
    ]
    assert new_batches(core, model, before) == {4: 1}


def test_lengths_of_different_buckets_wait_for_their_like(core: InferenceCore) -> None:
    sent = [send(core, "buckets", fp32("values", [1] * n), fp32("mask", [1] * n)) for n in (3, 4, 3, 4)]
    assert core.repository.get("buckets").pending == 4
    for call, future in sent:
        call.cancel()
        assert future.cancelled()


def test_inputs_of_different_lengths_are_refused(core: InferenceCore) -> None:
    with pytest.raises(InvalidArgumentError, match=r"differ in length: \{'values': 2, 'mask': 3\}"):
        send(core, "masked_sum", fp32("values", [1, 1]), fp32("mask", [1, 1, 1]))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (_parameter("length_axis", "values:1"), "'length_mask' is missing beside length_axis"),
        (LENGTHS.replace("values:1", "values:0"), "'values:0', expected NAME:AXIS"),
        (LENGTHS.replace("values:1", "value:1"), "'value:1', which isn't there"),
        (LENGTHS.replace("doubled:1", "total:1"), r"'total:1', whose shape is \[-1\]"),
        (LENGTHS.replace('value: "mask"', 'value: "total"'), "'total', length_axis has"),
        (LENGTHS + _parameter("length_buckets", "few"), "'few', expected numbers"),
    ],
)
def test_lengths_that_cannot_be_are_refused(tmp_path: Path, parameters: str, message: str) -> None:
    write_model(tmp_path / "m", masked_sum())
    (tmp_path / "m" / "config.pbtxt").write_text(FOUR + parameters)
    with pytest.raises(ModelLoadError, match=message):
        _load(tmp_path)


def _load(root: Path) -> None:
    repository = Repository(ServerSettings(model_repository=(root,)))
    repository.load()
    try:
        problems = [problem for model in repository.models for problem in model.problems.values()]
        if problems:
            raise ModelLoadError(problems[0])
    finally:
        repository.close()


def test_a_reshape_is_undone_for_the_client(core: InferenceCore) -> None:
    sent = [send(core, "flat", fp32("x", [i])) for i in range(4)]
    assert [outputs(future)["y"] for _, future in sent] == [[[float(i)]] for i in range(4)]
    with pytest.raises(InvalidArgumentError, match=r"expected shape \[-1, 1\], got \[2\]"):
        send(core, "flat", fp32("x", 1, 2))


@pytest.mark.parametrize("shape", ["2", "-1"])
def test_a_reshape_to_another_number_of_elements_is_refused(tmp_path: Path, shape: str) -> None:
    write_model(tmp_path / "m", identity(["n", "width"]))
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 8 " + _reshaped(3, shape))
    with pytest.raises(ModelLoadError, match="expected the same number of elements"):
        _load(tmp_path)


def test_answers_keep_the_order_of_arrival_where_the_config_asks_for_it(core: InferenceCore) -> None:
    order: list[int] = []
    lock = threading.Lock()

    def note(number: int) -> None:
        with lock:
            order.append(number)

    # The second request is a batch by itself; the third completes the first one's.
    sent = []
    for number, (rows, width) in enumerate(((1, 2), (4, 3), (3, 2))):
        _, future = send(core, "ordered", fp32("x", *[[number] * width] * rows))
        future.add_done_callback(lambda _, number=number: note(number))  # type: ignore[misc] # a default argument
        sent.append(future)
        if number == 1:
            wait_for_batches(core, "ordered", {4: 1})
            assert not future.done()
    for future in sent:
        future.result(30)
    assert order == [0, 1, 2]
    assert batches(core, "ordered") == {4: 2}


def wait_for_batches(core: InferenceCore, model: str, expected: dict[int, int]) -> None:
    end = time.monotonic() + 30
    while batches(core, model) != expected:
        assert time.monotonic() < end, f"never saw {expected}"


def test_what_was_decided_stands_in_the_metadata_and_the_config(core: InferenceCore) -> None:
    assert core.repository.get("scaled").properties["batching"] == "up to 8 rows (by config)"
    assert core.repository.get("alone").properties["batching"].startswith(("up to ", "off: it does not pay"))


def test_nothing_is_completed_where_the_flag_says_so(root: Path) -> None:
    settings = ServerSettings(model_repository=(root,), disable_auto_complete_config=True)
    repository = Repository(settings)
    repository.load()
    version = repository.get("alone")
    assert version.properties["batching"] == "off: the config has no dynamic_batching"
    assert not version.config.message.HasField("dynamic_batching")
    repository.close()
