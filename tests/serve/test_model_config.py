"""config.pbtxt: completed from the graph, checked against it, never half understood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf import text_format

from serve.errors import ModelLoadError
from serve.model.config_pbtxt import read_config, select_versions
from serve.model.model_config import ModelConfig, resolve
from serve.pb import model_config_pb2 as pb
from serve.runtime.backend_config import session_settings
from serve.runtime.session import GraphTensor

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = (GraphTensor("x", "tensor(float)", (-1, 3)),)
OUTPUTS = (GraphTensor("y", "tensor(int64)", (-1,)), GraphTensor("z", "tensor(string)", (-1, 2)))


def parsed(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


def resolved(text: str) -> ModelConfig:
    return resolve(parsed(text), "m", INPUTS, OUTPUTS, {})


def read(folder: Path, text: str) -> pb.ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.pbtxt").write_text(text)
    return read_config(folder)


def test_without_a_config_all_comes_from_the_graph(tmp_path: Path) -> None:
    config = resolve(read_config(tmp_path), "m", INPUTS, OUTPUTS, {})
    assert config.max_batch_size == 0
    assert {n: (s.datatype.name, s.shape) for n, s in config.inputs.items()} == {"x": ("FP32", (-1, 3))}
    assert {n: (s.datatype.name, s.shape) for n, s in config.outputs.items()} == {
        "y": ("INT64", (-1,)),
        "z": ("BYTES", (-1, 2)),
    }


def test_dims_leave_the_batch_dimension_out() -> None:
    config = resolved('max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: 3 }')
    assert config.inputs["x"].shape == (-1, 3)
    assert config.request_bytes == 8 * 3 * 4


def test_stated_outputs_are_the_ones_served_in_their_order() -> None:
    config = resolved('output { name: "z" data_type: TYPE_STRING dims: [-1, 2] }')
    assert list(config.outputs) == ["z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input { name: "a" data_type: TYPE_FP32 dims: [-1, 3] }', "graph's input 'x' is missing"),
        ('output { name: "a" data_type: TYPE_FP32 dims: 1 }', "output 'a' is not in the graph"),
        ('input { name: "x" data_type: TYPE_FP64 dims: [-1, 3] }', "TYPE_FP64, the graph has TYPE_FP32"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [-1, 4] }', r"\[-1, 4\], the graph has \[-1, 3\]"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [3] }', r"\[3\], the graph has \[-1, 3\]"),
    ],
)
def test_what_contradicts_the_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        resolved(text)


def test_a_batch_needs_a_dynamic_first_dimension() -> None:
    fixed = (GraphTensor("x", "tensor(float)", (1, 3)),)
    with pytest.raises(ModelLoadError, match="no dynamic first dimension: set max_batch_size to 0"):
        resolve(parsed("max_batch_size: 2"), "m", fixed, OUTPUTS, {})


def test_a_tensor_that_the_protocol_cannot_carry_is_refused() -> None:
    sequence = (GraphTensor("y", "seq(map(string,tensor(float)))", ()),)
    with pytest.raises(ModelLoadError, match="which the protocol has no datatype for"):
        resolve(parsed(""), "m", INPUTS, sequence, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: lots", "config.pbtxt: 1:17"),
        ("no_such_field: 1", "no_such_field"),
        ("ensemble_scheduling { max_inflight_requests: 1 }", "field 'ensemble_scheduling' is not supported"),
        ('input { name: "x" optional: true }', "field 'input.optional' is not supported"),
        ("input { allow_ragged_batch: true }", "field 'input.allow_ragged_batch' is not supported"),
        (
            'parameters { key: "intra_op_thread_coun" value { string_value: "1" } }',
            "'intra_op_thread_coun' is unknown: did you mean 'intra_op_thread_count'",
        ),
        ('name: "other"', "name is 'other', expected 'm'"),
        ('backend: "python"', "backend is 'python', expected 'onnxruntime'"),
        ('platform: "tensorrt_plan"', "platform is 'tensorrt_plan'"),
        ("max_batch_size: -1", "max_batch_size is -1"),
        ('default_model_filename: "../../x.onnx"', "expected a file name without a folder"),
        ('output { name: "y" label_filename: "/etc/passwd" }', "expected a file name without a folder"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path / "m", text)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [10]),
        ("version_policy { latest { num_versions: 2 } }", [2, 10]),
        ("version_policy { all {} }", [1, 2, 10]),
        ("version_policy { specific { versions: [2, 1] } }", [1, 2]),
    ],
)
def test_version_policy(policy: str, expected: list[int]) -> None:
    assert select_versions(parsed(policy), [10, 1, 2]) == expected


def test_of_the_specific_versions_those_that_are_there_are_served() -> None:
    policy = parsed("version_policy { specific { versions: [3, 1] } }")
    assert select_versions(policy, [1, 2]) == [1]


def test_an_unknown_parameter_is_somebodys_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path / "m", 'parameters { key: "made_by" value { string_value: "me" } }')
    assert "parameter 'made_by' has no effect" in caplog.text


def test_more_instances_than_make_sense_are_refused() -> None:
    message = parsed("instance_group { count: 60 } instance_group { count: 5 }")
    with pytest.raises(ModelLoadError, match="count of 65, expected 64 at most"):
        session_settings(message, {}, 2)


def test_a_specific_version_that_is_missing_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"asks for \[3\], the folder has \[1\]"):
        select_versions(parsed("version_policy { specific { versions: 3 } }"), [1])
