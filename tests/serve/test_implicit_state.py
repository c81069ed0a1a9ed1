"""What the server feeds to a sequence model and keeps of it, on real graphs."""

from __future__ import annotations

import struct
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from serve.errors import InternalError, ModelLoadError
from serve.model.implicit_state import ImplicitState, hidden_inputs, hidden_outputs, warm_up_inputs
from serve.pb import model_config_pb2 as pb
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, Tensor
from serve.runtime.session import GraphTensor
from serve.scheduling.live_sequences import LiveSequence, SequenceStep
from serve.scheduling.scheduler import QueuedRequest
from serve.scheduling.sequence import SequenceScheduler
from serve.scheduling.sequence_config import SequenceSettings
from tests.graphs import write_model
from tests.serve import stateful_lstm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

GRAPH = (GraphTensor("x", "tensor(float)", (-1, 3)), GraphTensor("h", "tensor(float)", (-1, 2)))
RESULTS = (GraphTensor("y", "tensor(float)", (-1, 2)), GraphTensor("h_out", "tensor(float)", (-1, 2)))
STATE = 'state { input_name: "h" output_name: "h_out" data_type: TYPE_FP32 dims: 2 %s }'
INITIAL = STATE % 'initial_state { name: "first" data_type: TYPE_FP32 dims: 2 data_file: "%s" }'


def settings_of(text: str, max_batch_size: int = 4) -> SequenceSettings:
    message = text_format.Parse(text, pb.ModelSequenceBatching())
    return SequenceSettings.from_config(message, max_batch_size, 1, 5000)


def state_of(
    text: str,
    folder: Path,
    inputs: Sequence[GraphTensor] = GRAPH,
    outputs: Sequence[GraphTensor] = RESULTS,
    max_batch_size: int = 4,
) -> ImplicitState:
    return ImplicitState(settings_of(text, max_batch_size), inputs, outputs, max_batch_size, folder)


def queued(name: int | str, *, start: bool = False, end: bool = False) -> QueuedRequest:
    step = SequenceStep(LiveSequence(name, ()), start, end)
    return QueuedRequest(InferRequest("m", "", ()), Call(), Future(), sequence=step)


def again(earlier: QueuedRequest, *, end: bool = False) -> QueuedRequest:
    """The next request of the same sequence."""
    step = SequenceStep(earlier.sequence.sequence, end=end)
    return QueuedRequest(InferRequest("m", "", ()), Call(), Future(), sequence=step)


def rows(*values: float) -> np.ndarray:
    return np.array([[value, value] for value in values], np.float32)


# Control inputs

CONTROLS = """
    control_input { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [3, 5] } }
    control_input { name: "end" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 0.5] } }
    control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [false, true] } }
    control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_%s } }
"""


def control_graph(id_type: str, shape: tuple[int, ...]) -> list[GraphTensor]:
    types = {"start": "int32", "end": "float", "ready": "bool", "id": id_type}
    return [GraphTensor(name, f"tensor({onnx_type})", shape) for name, onnx_type in types.items()]


def test_controls_say_where_in_its_sequence_each_row_is(tmp_path: Path) -> None:
    states = state_of(CONTROLS % "UINT64", tmp_path, control_graph("uint64", (-1, 1)))
    feed = states.feed([queued(7, start=True), queued(1 << 63, end=True), queued(9)])
    assert {name: array.tolist() for name, array in feed.items()} == {
        "start": [[5], [3], [3]],
        "end": [[0], [0.5], [0]],
        "ready": [[True], [True], [True]],
        "id": [[7], [1 << 63], [9]],
    }
    assert {name: array.dtype.name for name, array in feed.items()} == {
        "start": "int32", "end": "float32", "ready": "bool", "id": "uint64",
    }  # fmt: skip


def test_without_a_batch_dimension_controls_have_one_element(tmp_path: Path) -> None:
    states = state_of(CONTROLS % "INT32", tmp_path, control_graph("int32", (1,)), max_batch_size=0)
    feed = states.feed([queued((5 << 32) + 6, start=True, end=True)])
    assert {name: array.tolist() for name, array in feed.items()} == {
        "start": [5], "end": [0.5], "ready": [True], "id": [6],
    }  # fmt: skip


def test_an_id_may_be_text(tmp_path: Path) -> None:
    states = state_of(CONTROLS % "STRING", tmp_path, control_graph("string", (-1, 1)))
    assert states.feed([queued("héé"), queued("b")])["id"].tolist() == [["héé"], ["b"]]
    assert states.first_feed(2)["id"].tolist() == [["0"], ["0"]]


# State


def test_a_sequence_gets_what_its_last_run_left(tmp_path: Path) -> None:
    states = state_of(STATE % "", tmp_path)
    assert states.extra_outputs == ("h_out",)
    first = [queued(1, start=True), queued(2, start=True)]
    assert states.feed(first)["h"].tolist() == rows(0, 0).tolist()
    states.store(first, {"h_out": rows(1, 2)})
    second = [again(first[1]), queued(3, start=True), again(first[0])]
    assert states.feed(second)["h"].tolist() == rows(2, 0, 1).tolist()


def test_a_start_forgets_the_state_and_an_end_frees_it(tmp_path: Path) -> None:
    states = state_of(STATE % "", tmp_path)
    first = queued(1, start=True)
    states.store([first], {"h_out": rows(1)})
    assert states.feed([first])["h"].tolist() == rows(0).tolist()
    states.store([again(first, end=True)], {"h_out": rows(2)})
    assert first.sequence.sequence.state is None


def test_a_kept_row_does_not_keep_the_batch(tmp_path: Path) -> None:
    states = state_of(STATE % "", tmp_path)
    outputs = {"h_out": rows(1, 2)}
    batch = weakref.ref(outputs["h_out"])
    kept = [queued(1, start=True), queued(2, start=True)]
    states.store(kept, outputs)
    outputs.clear()
    assert batch() is None


def test_states_may_grow(tmp_path: Path) -> None:
    text = 'state { input_name: "h" output_name: "h_out" data_type: TYPE_FP32 dims: -1 }'
    graph = [GraphTensor(name, "tensor(float)", (-1, -1)) for name in ("h", "h_out")]
    states = state_of(text, tmp_path, graph, graph)
    first = queued(1, start=True)
    assert states.feed([first])["h"].tolist() == [[0]]
    states.store([first], {"h_out": np.ones((1, 3), np.float32)})
    assert first.sequence.sequence.state_shape == ((3,),)
    assert states.feed([again(first)])["h"].shape == (1, 3)


def test_without_a_batch_dimension_the_state_is_the_whole_output(tmp_path: Path) -> None:
    graph = [GraphTensor(name, "tensor(float)", (2,)) for name in ("h", "h_out")]
    states = state_of(STATE % "", tmp_path, graph, graph, 0)
    first = queued(1, start=True)
    assert states.feed([first])["h"].tolist() == [0, 0]
    states.store([first], {"h_out": np.array([1, 2], np.float32)})
    assert states.feed([again(first)])["h"].tolist() == [1, 2]


def test_a_state_of_another_shape_is_not_kept(tmp_path: Path) -> None:
    states = state_of(STATE % "", tmp_path)
    first = [queued(1, start=True), queued(2, start=True)]
    with pytest.raises(InternalError, match=r"state 'h_out' the shape \[1, 2\], expected \[2, 2\]"):
        states.store(first, {"h_out": rows(1)})
    assert first[0].sequence.sequence.state is None


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_a_first_state_may_come_from_a_file(datatype: str, tmp_path: Path) -> None:
    row = DATATYPES[datatype]
    (tmp_path / "initial_state").mkdir()
    data = np.arange(2).astype(row.dtype)
    (tmp_path / "initial_state" / "h0").write_bytes(data.tobytes() + b"more")
    graph = [GraphTensor(name, row.onnx, (-1, 2)) for name in ("h", "h_out")]
    states = state_of((INITIAL % "h0").replace("TYPE_FP32", row.config), tmp_path, graph, graph)
    fed = states.feed([queued(1, start=True), queued(2, start=True)])["h"]
    assert fed.dtype == row.dtype
    assert np.array_equal(fed, [data, data])


def test_a_state_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "initial_state").mkdir()
    parts = [struct.pack("<I", len(text)) + text for text in ("é".encode(), b"")]
    (tmp_path / "initial_state" / "h0").write_bytes(b"".join(parts))
    graph = [GraphTensor(name, "tensor(string)", (-1, 2)) for name in ("h", "h_out")]
    text = (INITIAL % "h0").replace("TYPE_FP32", "TYPE_STRING")
    assert state_of(text, tmp_path, graph, graph).first_feed(1)["h"].tolist() == [["é", ""]]
    text = (STATE % "").replace("TYPE_FP32", "TYPE_STRING")
    assert state_of(text, tmp_path, graph, graph).first_feed(1)["h"].tolist() == [["", ""]]


# What can't be served


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", "missing", ".", "short"])
def test_a_first_state_comes_from_its_own_folder_and_is_whole(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "initial_state").mkdir(parents=True)
    (model / "secret").write_bytes(bytes(8))
    (model / "initial_state" / "link").symlink_to(model / "secret")
    (model / "initial_state" / "short").write_bytes(bytes(7))
    with pytest.raises(ModelLoadError, match="data_file"):
        state_of(INITIAL % name, model)


def test_the_folder_of_first_states_may_not_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h0").write_bytes(bytes(8))
    (tmp_path / "model" / "initial_state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelLoadError, match="data_file"):
        state_of(INITIAL % "h0", tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (STATE.replace('"h"', '"g"') % "", r"state.input_name is 'g', the graph has \['x', 'h'\]"),
        (STATE.replace('"h_out"', '"g"') % "", r"state.output_name is 'g'"),
        (STATE.replace("FP32", "FP64") % "", r"'h' is TYPE_FP64, the graph has tensor\(float\)"),
        (STATE.replace("dims: 2", "dims: 3") % "", r"'h' has the shape \[-1, 3\], the graph has \[-1, 2\]"),
        (STATE.replace("dims: 2", "dims: -1") % "", r"'h' has the shape \[-1, -1\]"),
        (STATE.replace("dims: 2", "") % "", r"'h' has the shape \[-1\]"),
        (CONTROLS % "INT64", "control_input.name is 'start'"),
        (
            'control_input { name: "x" control { fp32_false_true: [0, 1] } }',
            r"control_input.name 'x' has the shape \[-1, 1\], the graph has \[-1, 3\]",
        ),
    ],
)
def test_what_the_graph_does_not_have_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=problem):
        state_of(text, tmp_path)


def test_a_state_is_not_larger_than_a_gigabyte(tmp_path: Path) -> None:
    graph = [GraphTensor(name, "tensor(float)", (-1, -1)) for name in ("h", "h_out")]
    with pytest.raises(ModelLoadError, match="at most"):
        state_of(STATE.replace("dims: 2", "dims: 999999999999") % "", tmp_path, graph, graph)


# What the config hides


def test_what_the_server_fills_is_hidden() -> None:
    text = "sequence_batching {" + CONTROLS % "INT64" + STATE % "" + "}"
    message = text_format.Parse(text, pb.ModelConfig())
    assert hidden_inputs(message) == {"start", "end", "ready", "id", "h"}
    assert hidden_outputs(message) == {"h_out"}
    assert hidden_inputs(pb.ModelConfig()) == hidden_outputs(pb.ModelConfig()) == set()
    message.input.add(name="h")
    with pytest.raises(ModelLoadError, match="input 'h' is a control or state"):
        hidden_inputs(message)


def test_a_warm_up_gets_first_requests(tmp_path: Path) -> None:
    message = text_format.Parse("max_batch_size: 4 sequence_batching {" + STATE % "" + "}", pb.ModelConfig())
    fed = warm_up_inputs(message, GRAPH, RESULTS, tmp_path, 3)
    assert fed["h"].tolist() == rows(0, 0, 0).tolist()
    assert warm_up_inputs(pb.ModelConfig(), GRAPH, RESULTS, tmp_path, 3) == {}


# A whole model


@pytest.fixture(scope="module")
def lstm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ort.InferenceSession]:
    folder = tmp_path_factory.mktemp("lstm")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    graphs = {"step": stateful_lstm.step(), "whole": stateful_lstm.whole()}
    return {
        name: ort.InferenceSession(write_model(folder / name, graph), options)
        for name, graph in graphs.items()
    }


def described(nodes: Sequence[Any]) -> list[GraphTensor]:
    return [
        GraphTensor(node.name, node.type, tuple(d if isinstance(d, int) else -1 for d in node.shape))
        for node in nodes
    ]


class Loop:
    """What the server does, on one thread: whatever waits is run until nothing does."""

    def __init__(self, session: ort.InferenceSession, text: str, max_batch_size: int, folder: Path) -> None:
        message = text_format.Parse(text, pb.ModelConfig())
        settings = SequenceSettings.from_config(message.sequence_batching, max_batch_size, 1, 5000)
        self.scheduler = SequenceScheduler(settings)
        self.states = ImplicitState(
            settings,
            described(session.get_inputs()),
            described(session.get_outputs()),
            max_batch_size,
            folder,
        )
        self.session = session
        self.batches: list[int] = []

    def send(self, name: int, row: np.ndarray, *, start: bool, end: bool) -> Future[Any]:
        tensor = Tensor("x", DATATYPES["FP32"], row[np.newaxis])
        parameters = {"sequence_id": name, "sequence_start": start, "sequence_end": end}
        request = QueuedRequest(InferRequest("m", "", (tensor,), parameters=parameters), Call(), Future())
        self.scheduler.enqueue(request, 0.0)
        return request.future

    def run(self) -> None:
        while len(self.scheduler):
            batch = self.scheduler.next(0.0).batch
            x = np.concatenate([queued.request.inputs[0].array for queued in batch])
            wanted = ["y", *self.states.extra_outputs]
            outputs = self.session.run(wanted, {"x": x, **self.states.feed(batch)})
            self.states.store(batch, dict(zip(wanted, outputs, strict=True)))
            for row, queued in enumerate(batch):
                queued.future.set_result(outputs[0][row])
            self.scheduler.finished(batch, 0.0)
            self.batches.append(len(batch))


def interleaved(lengths: Sequence[int], random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(sequence, step) of all sequences, in any order that keeps each one's own."""
    order = np.repeat(np.arange(len(lengths)), lengths)
    random.shuffle(order)
    steps = [0] * len(lengths)
    for sequence in order:
        yield int(sequence), steps[sequence]
        steps[sequence] += 1


@pytest.mark.parametrize(
    "strategy", ["direct { }", "oldest { max_candidate_sequences: 1000 preferred_batch_size: [8, 32] }"]
)
def test_a_thousand_interleaved_sequences_equal_the_whole_ones(
    strategy: str, lstm: dict[str, ort.InferenceSession], tmp_path: Path
) -> None:
    random = np.random.default_rng(3)
    lengths = random.integers(1, 12, 1000).tolist()
    inputs = [random.normal(0, 1, (length, stateful_lstm.INPUTS)).astype(np.float32) for length in lengths]
    loop = Loop(lstm["step"], stateful_lstm.CONFIG % (32, 0, strategy), 32, tmp_path)
    answers: list[list[Future[Any]]] = [[] for _ in lengths]
    for i, (sequence, step) in enumerate(interleaved(lengths, random)):
        row, last = inputs[sequence][step], step == lengths[sequence] - 1
        answers[sequence].append(loop.send(sequence + 1, row, start=step == 0, end=last))
        if i % 50 == 0 and strategy.startswith("oldest"):
            loop.run()  # now and then, so that requests come both before and after the answer to the last
    loop.run()
    assert loop.scheduler.live == 0
    assert max(loop.batches) == 32
    for rows_in, futures in zip(inputs, answers, strict=True):
        (expected,) = lstm["whole"].run(["y"], {"x": rows_in[:, np.newaxis]})
        got = np.stack([future.result(0) for future in futures])
        np.testing.assert_allclose(got, expected[:, 0, 0], rtol=0, atol=1e-6)
