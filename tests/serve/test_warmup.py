"""Between a graph's loading and its first request: model_warmup, and whether batches pay and may be made."""

from __future__ import annotations

import io
import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.repository import golden as golden_bytes
from serve.errors import ModelLoadError
from serve.loading.warmup import WarmUp, warm_up
from serve.model.model_config import resolve
from serve.pb import model_config_pb2 as pb
from serve.runtime.session import Session, SessionSettings
from tests.graphs import FLOAT, ONNX_TYPES, addition, gather, identity, info, scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx

    from serve.request import Call


class Recorded(Session):
    """A session that remembers what it was fed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SessionSettings())
        self.fed: list[dict[str, np.ndarray]] = []

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], call: Call | None = None
    ) -> list[np.ndarray]:
        self.fed.append(dict(inputs))
        return super().run(inputs, outputs, call)


class Loaded:
    """A graph in a model folder with a config."""

    def __init__(self, folder: Path, graph: onnx.GraphProto, config: str = "") -> None:
        self.folder = folder
        path = write_model(folder, graph)
        self.version = path.parent
        self.session = Recorded(path)
        message = text_format.Parse(config, pb.ModelConfig())
        self.config = resolve(message, folder.name, self.session.inputs, self.session.outputs, {})

    def warm_up(self) -> WarmUp:
        return warm_up(self.session, self.config, self.folder, self.version)

    @property
    def fed(self) -> list[dict[str, np.ndarray]]:
        return self.session.fed


def node_graph(operator: str, shape: Sequence[int | str], **attributes: Any) -> onnx.GraphProto:
    """One operator from x to y, of the same shape."""
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return helper.make_graph([node], operator, [info("x", shape)], [info("y", shape)])


def quantized(*, by_row: bool) -> onnx.GraphProto:
    """y = x in 8 bits, by the range of all of x; `by_row`: of a constant, so that no row sees another."""
    bounds = numpy_helper.from_array(np.array([-1, 1], np.float32), "bounds")
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["bounds" if by_row else "x"], ["q", "scale", "zero"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["in_8_bits"]),
        helper.make_node("DequantizeLinear", ["in_8_bits", "scale", "zero"], ["y"]),
    ]
    return helper.make_graph(nodes, "q", [info("x", ["n", 16])], [info("y", ["n", 16])], [bounds])


def mixing() -> onnx.GraphProto:
    """Each row minus the mean of all rows."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return helper.make_graph(nodes, "mixing", [info("x", ["n", 16])], [info("y", ["n", 16])])


def only_length_5() -> onnx.GraphProto:
    """Takes rows of any length, as it says, and fails on others than 5."""
    weights = numpy_helper.from_array(np.ones((5, 2), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return helper.make_graph([node], "g", [info("x", ["n", "length"])], [info("y", ["n", 2])], [weights])


def declare(version: Path, *, independent: bool) -> None:
    report = {"variants": {"int8": {"file": "model.onnx", "rows_independent": independent}, "fp32": {}}}
    (version / "report.json").write_text(json.dumps(report))


def test_a_small_graph_is_worth_batching(tmp_path: Path) -> None:
    found = Loaded(tmp_path, node_graph("Relu", ["n", 4]), "max_batch_size: 16").warm_up()
    assert found.useful_batch_size > 1
    assert found.rows_independent
    assert found.figures[found.useful_batch_size] < found.figures[1]
    assert found.seconds > 0


@pytest.mark.parametrize("config", ["", "max_batch_size: 1"])
def test_without_batches_nothing_is_measured(tmp_path: Path, config: str) -> None:
    model = Loaded(tmp_path, scaled(2), config)
    assert model.warm_up().useful_batch_size == 1
    assert model.fed == []


@pytest.mark.parametrize("graph", [quantized(by_row=False), mixing()])
def test_rows_that_depend_on_each_other_are_not_batched(tmp_path: Path, graph: onnx.GraphProto) -> None:
    found = Loaded(tmp_path, graph, "max_batch_size: 8").warm_up()
    assert (found.useful_batch_size, found.rows_independent) == (1, False)
    assert found.reason


def test_the_exporters_word_stands_above_the_operators(tmp_path: Path) -> None:
    bound = Loaded(tmp_path / "bound", quantized(by_row=True), "max_batch_size: 8")
    assert not bound.warm_up().rows_independent
    declare(bound.version, independent=True)
    assert bound.warm_up().rows_independent
    plain = Loaded(tmp_path / "plain", node_graph("Relu", ["n", 4]), "max_batch_size: 8")
    declare(plain.version, independent=False)
    assert plain.warm_up().rows_independent is False


def test_the_exporters_word_does_not_stand_above_what_runs_show(tmp_path: Path) -> None:
    model = Loaded(tmp_path, quantized(by_row=False), "max_batch_size: 8")
    declare(model.version, independent=True)
    found = model.warm_up()
    assert (found.useful_batch_size, found.rows_independent) == (1, False)
    assert "beside other rows" in found.reason


def test_an_output_without_rows_is_not_batched(tmp_path: Path) -> None:
    node = helper.make_node("Unique", ["x"], ["y"])
    graph = helper.make_graph([node], "unique", [info("x", ["n", 4])], [info("y", ["m"])])
    found = Loaded(tmp_path, graph, "max_batch_size: 8").warm_up()
    assert (found.useful_batch_size, found.rows_independent) == (1, False)
    assert "has shape" in found.reason


def test_a_graph_that_made_up_rows_do_not_fit_is_not_measured(tmp_path: Path) -> None:
    found = Loaded(tmp_path, only_length_5(), "max_batch_size: 8").warm_up()
    assert (found.useful_batch_size, found.rows_independent, found.figures) == (1, True, {})
    assert found.reason.startswith("not measured")


def test_golden_rows_are_what_it_is_measured_on(tmp_path: Path) -> None:
    model = Loaded(tmp_path, only_length_5(), "max_batch_size: 8")
    rows = np.random.default_rng(0).random((3, 5), np.float32)
    (model.version / "golden.npz").write_bytes(golden_bytes({"x": rows}, {"y": rows[:, :2]}, {}))
    found = model.warm_up()
    assert found.figures
    assert np.array_equal(model.fed[0]["x"], rows[:1])
    assert np.array_equal(model.fed[4]["x"], rows[[0, 1, 2, 0]])  # after four alone, the same together


def test_the_configs_sizes_are_those_of_made_up_rows(tmp_path: Path) -> None:
    config = 'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: 5 }'
    assert Loaded(tmp_path, only_length_5(), config).warm_up().figures


def test_integers_are_zero_for_they_may_be_places_in_a_table(tmp_path: Path) -> None:
    model = Loaded(tmp_path, gather(), "max_batch_size: 8")
    assert model.warm_up().figures
    assert not any(feed["x"].any() for feed in model.fed)


@pytest.mark.parametrize("batching", ["preferred_batch_size: [4]", "max_queue_delay_microseconds: 100"])
def test_a_config_that_says_how_to_batch_is_taken_at_its_word(tmp_path: Path, batching: str) -> None:
    model = Loaded(tmp_path, scaled(2), f"max_batch_size: 8 dynamic_batching {{ {batching} }}")
    assert model.warm_up().useful_batch_size == 8


SAMPLE = "model_warmup { name: 's' batch_size: 1 %s inputs { key: 'x' value { data_type: TYPE_FP32 %s } } }"


def test_samples_run_as_often_and_with_as_many_rows_as_they_say(tmp_path: Path) -> None:
    value = "data_type: TYPE_FP32 dims: 3 zero_data: true"
    inputs = "".join(f"inputs {{ key: '{name}' value {{ {value} }} }}" for name in "ab")
    config = f"max_batch_size: 4 model_warmup {{ name: 's' batch_size: 3 count: 2 {inputs} }}"
    model = Loaded(tmp_path, addition(), config)
    model.warm_up()
    for feed in model.fed[:2]:
        assert [feed[name].shape for name in "ab"] == [(3, 3)] * 2
        assert not feed["a"].any()
    assert model.fed[2]["a"].shape == (1, 3)  # what is measured then


def test_random_data_is_random(tmp_path: Path) -> None:
    model = Loaded(tmp_path, identity([2, 50]), SAMPLE % ("", "dims: [2, 50] random_data: true"))
    model.warm_up()
    values = model.fed[0]["x"]
    assert values.shape == (2, 50)
    assert len(np.unique(values)) > 50
    assert 0 <= values.min() <= values.max() < 1


@pytest.mark.parametrize("name", ["INT8", "BOOL", "INT64", "BF16", "FP16"])
def test_random_data_of_every_kind(tmp_path: Path, name: str) -> None:
    onnx_type = ONNX_TYPES[name]
    config = (SAMPLE % ("", "dims: [40] random_data: true")).replace("FP32", name)
    model = Loaded(tmp_path, identity([40], onnx_type), config)
    model.warm_up()
    assert len(np.unique(model.fed[0]["x"])) > 1


def test_a_file_is_one_row_for_all(tmp_path: Path) -> None:
    sample = (SAMPLE % ("", "dims: 4 input_data_file: 'row'")).replace("size: 1", "size: 2")
    model = Loaded(tmp_path, scaled(2), f"max_batch_size: 2 {sample}")
    (tmp_path / "warmup").mkdir()
    row = np.arange(4, dtype=np.float32)
    (tmp_path / "warmup" / "row").write_bytes(row.tobytes() + b"more than is needed, as Triton allows")
    model.warm_up()
    assert np.array_equal(model.fed[0]["x"], [row, row])


def test_text_comes_from_a_file_or_is_empty(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    texts = ["a", "bäh"]
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    (tmp_path / "warmup" / "texts").write_bytes(data)
    config = "".join(
        (SAMPLE % ("", f"dims: 2 {source}")).replace("FP32", "STRING")
        for source in ("input_data_file: 'texts'", "zero_data: true", "random_data: true")
    )
    model = Loaded(tmp_path, identity([2], TensorProto.STRING), config)
    model.warm_up()
    assert [feed["x"].tolist() for feed in model.fed] == [texts, ["", ""], ["", ""]]


def test_a_sample_without_rows_is_skipped(tmp_path: Path) -> None:
    config = (SAMPLE % ("", "dims: 3 zero_data: true")).replace("batch_size: 1", "batch_size: 0")
    model = Loaded(tmp_path, identity([3]), config)
    model.warm_up()
    assert model.fed == []


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (SAMPLE % ("", "dims: 4"), "expected zero_data, random_data or input_data_file"),
        (SAMPLE % ("", "dims: 5 zero_data: true"), r"dims make \[1, 5\], expected \[-1, 4\]"),
        (SAMPLE % ("", "dims: -1 zero_data: true"), "expected sizes of 0 or more"),
        (SAMPLE % ("", "dims: [1000000, 1000000] zero_data: true"), "of at most"),
        (SAMPLE % ("", "dims: 4 input_data_file: 'absent'"), "expected a file in the folder warmup/"),
        (SAMPLE % ("", "dims: 4 input_data_file: '../secret'"), "expected a file in the folder warmup/"),
        (SAMPLE % ("", "dims: 4 input_data_file: 'link'"), "expected a file in the folder warmup/"),
        (SAMPLE % ("", "dims: 4 input_data_file: 'short'"), "has 3 bytes, expected 16"),
        (SAMPLE % ("count: 1000000", "dims: 4 zero_data: true"), "count 1000000, expected at most"),
        ((SAMPLE % ("", "dims: 4 zero_data: true")).replace("size: 1", "size: 9"), "batch_size is 9"),
        (
            (SAMPLE % ("", "dims: 4 zero_data: true")).replace("FP32", "FP16"),
            "is TYPE_FP16, expected TYPE_FP32",
        ),
        ((SAMPLE % ("", "dims: 4 zero_data: true")).replace("'x'", "'z'"), r"expected the inputs \['x'\]"),
        ("model_warmup { name: 's' batch_size: 1 }", r"expected the inputs \['x'\], got \[\]"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(tmp_path: Path, sample: str, problem: str) -> None:
    folder = tmp_path / "model"
    model = Loaded(folder, scaled(2), f"max_batch_size: 8 {sample}")
    (folder / "warmup").mkdir()
    (folder / "secret").write_bytes(bytes(16))
    (folder / "warmup" / "short").write_bytes(b"abc")
    (folder / "warmup" / "link").symlink_to(folder / "secret")
    with pytest.raises(ModelLoadError, match=rf"model_warmup 's'.*{problem}"):
        model.warm_up()


def test_a_sample_whose_run_fails_keeps_the_model_from_being_ready(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "row").write_bytes(struct.pack("<q", 99))
    config = (SAMPLE % ("", "dims: 1 input_data_file: 'row'")).replace("FP32", "INT64")
    with pytest.raises(ModelLoadError, match=r"model_warmup 's': its run failed: .*out of (data )?bounds"):
        Loaded(tmp_path, gather(), config).warm_up()


def test_a_reshaped_input_reaches_the_graph_in_its_own_shape(tmp_path: Path) -> None:
    config = (
        "max_batch_size: 2 input { name: 'x' data_type: TYPE_FP32 dims: 1 reshape { } } "
        "output { name: 'y' data_type: TYPE_FP32 dims: 1 reshape { } } "
    )
    model = Loaded(tmp_path, identity(["n"]), config + SAMPLE % ("", "dims: 1 zero_data: true"))
    model.warm_up()
    assert model.fed[0]["x"].shape == (1,)


@pytest.mark.parametrize("source", ["input_data_file: 'image'", "zero_data: true"])
def test_image_files_are_decoded(tmp_path: Path, source: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "image").write_bytes(struct.pack("<I", buffer.tell()) + buffer.getvalue())
    config = (
        "max_batch_size: 2 input { name: 'x' data_type: TYPE_STRING dims: 1 } "
        "parameters { key: 'encoded_image' value { string_value: 'x' } } "
        + (SAMPLE % ("", f"dims: 1 {source}")).replace("FP32", "STRING")
    )
    model = Loaded(tmp_path, identity(["n", 6, 8, 3], TensorProto.UINT8), config)
    model.warm_up()
    assert np.array_equal(model.fed[0]["x"][0], pixels if "file" in source else np.zeros_like(pixels))


def stateful() -> onnx.GraphProto:
    """y = x + (state where not start); the state is the sum so far."""
    nodes = [
        helper.make_node("Sub", ["one", "start"], ["goes_on"]),
        helper.make_node("Mul", ["state", "goes_on"], ["kept"]),
        helper.make_node("Add", ["x", "kept"], ["y"]),
        helper.make_node("Identity", ["y"], ["state_out"]),
    ]
    one = helper.make_tensor("one", FLOAT, [], [1.0])
    inputs = [info(name, ["n", 1]) for name in ("x", "start", "state")]
    outputs = [info(name, ["n", 1]) for name in ("y", "state_out")]
    return helper.make_graph(nodes, "stateful", inputs, outputs, [one])


def test_controls_and_states_are_filled_in(tmp_path: Path) -> None:
    config = """max_batch_size: 4
        sequence_batching {
            direct { }
            control_input { name: "start"
                control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
            state { input_name: "state" output_name: "state_out" data_type: TYPE_FP32 dims: 1 }
        }"""
    sample = (SAMPLE % ("", "dims: 1 random_data: true")).replace("size: 1", "size: 2")
    model = Loaded(tmp_path, stateful(), f"{config} {sample}")
    found = model.warm_up()
    assert len(model.fed) == 1
    assert model.fed[0].keys() == {"x", "start", "state"}
    assert model.fed[0]["start"].tolist() == [[1], [1]]
    assert found.reason.startswith("not measured: runs are made of")


def test_a_sample_may_state_controls_itself(tmp_path: Path) -> None:
    config = """max_batch_size: 4
        sequence_batching {
            control_input { name: "start"
                control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
            state { input_name: "state" output_name: "state_out" data_type: TYPE_FP32 dims: 1 }
        }
        model_warmup { name: "s" batch_size: 1
            inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 zero_data: true } }
            inputs { key: "start" value { data_type: TYPE_FP32 dims: 1 zero_data: true } } }"""
    model = Loaded(tmp_path, stateful(), config)
    model.warm_up()
    assert model.fed[0]["start"].tolist() == [[0]]
