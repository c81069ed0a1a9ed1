"""What a graph file says of itself, read without onnx and without loading it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from serve.errors import ModelLoadError
from serve.loading.graph_file import external_data, read_graph_file
from tests.graphs import info, slow, write_model

if TYPE_CHECKING:
    from pathlib import Path

RATHER_LARGE = 300_000


def with_external_data(folder: Path, location: str = "weights.bin") -> Path:
    """y = x + w, with w in a file of its own; its location is then changed to `location`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = numpy_helper.from_array(np.ones(1024, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [info("x", [1024])], [info("y", [1024])], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = onnx.load(path, load_external_data=False)
    stored.graph.initializer[0].external_data[0].value = location
    path.write_bytes(stored.SerializeToString())
    return path


def operators_in(graph: onnx.GraphProto) -> set[str]:
    found = set()
    for node in graph.node:
        found.add(node.op_type)
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found |= operators_in(inner)
    return found


def test_operators_of_subgraphs_are_found(tmp_path: Path) -> None:
    graph = slow()
    assert read_graph_file(write_model(tmp_path, graph)).operators == operators_in(graph)
    assert "MatMul" in operators_in(graph)  # in the loop's body


def test_operators_of_functions_are_found(tmp_path: Path) -> None:
    inner = helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "s", "z"])
    function = helper.make_function("own", "F", ["a"], ["q"], [inner], [helper.make_opsetid("", 17)])
    node = helper.make_node("F", ["x"], ["y"], domain="own")
    graph = helper.make_graph([node], "g", [info("x", [2])], [info("y", [2], TensorProto.UINT8)])
    model = helper.make_model(graph, functions=[function], ir_version=9)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    found = read_graph_file(path)
    assert found.operators == {"F", "DynamicQuantizeLinear"}
    assert found.quantizes_dynamically


@pytest.mark.parametrize(
    ("operator", "dynamic"),
    [
        ("DynamicQuantizeLinear", True),
        ("DynamicQuantizeLSTM", True),
        ("DynamicQuantizeMatMul", True),
        ("QuantizeLinear", False),
        ("MatMulNBits", False),
    ],
)
def test_dynamic_quantization_is_told_by_its_operators(
    tmp_path: Path, operator: str, *, dynamic: bool
) -> None:
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", [], [])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert read_graph_file(tmp_path / "model.onnx").quantizes_dynamically is dynamic


def test_tensors_of_any_size_are_skipped(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.zeros(RATHER_LARGE, np.float32), f"w{i}") for i in range(3)]
    nodes = [
        helper.make_node("Constant", [], ["c"], value=weights[0]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [info("y", [RATHER_LARGE])], weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert read_graph_file(path).operators == {"Constant", "Relu"}


def test_external_data_beside_the_graph_is_allowed(tmp_path: Path) -> None:
    assert external_data(with_external_data(tmp_path)) == ["weights.bin"]
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights.bin").rename(tmp_path / "inner" / "w.bin")
    assert external_data(with_external_data(tmp_path, "inner/w.bin")) == ["inner/w.bin"]


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("../secret.bin", "no plain path"),
        ("inner/../../secret.bin", "no plain path"),
        ("/etc/passwd", "no relative path"),
        ("", "no relative path"),
        ("a\0b", "no relative path"),
        ("..\\secret.bin", "no relative path"),
        ("symlink.bin", "symbolic link"),
        ("linked/secret.bin", "symbolic link"),
        ("hardlink.bin", "hard link"),
        ("absent.bin", "no such file"),
        ("*/_ORT_MEM_ADDR_/*", "no such file"),
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str, problem: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    folder = tmp_path / "1"
    path = with_external_data(folder, location)
    (folder / "symlink.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)
    os.link(tmp_path / "secret.bin", folder / "hardlink.bin")
    with pytest.raises(ModelLoadError, match=problem):
        external_data(path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x3a\xff\xff\xff\xff\x0f", b"\x08" + b"\xff" * 20, b"\x0b"]
)
def test_other_bytes_are_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.onnx is no ONNX model"):
        read_graph_file(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ModelLoadError, match="no file"):
        read_graph_file(tmp_path / "model.onnx")


def test_deep_nesting_needs_no_recursion(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "inner", [], [])
    encoded = graph.SerializeToString()
    for _ in range(2000):  # Graph.node, Node.attribute, Attribute.g
        for tag in (0x32, 0x2A, 0x0A):
            encoded = bytes([tag]) + _length(len(encoded)) + encoded
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x3a" + _length(len(encoded)) + encoded)
    assert read_graph_file(path).operators == {"Relu"}


def _length(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return with_external_data(tmp_path_factory.mktemp("good")).read_bytes()


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_read_or_refused(tmp_path: Path, original: bytes, data: st.DataObject) -> None:
    """Any damage leads to an answer or a ModelLoadError, never to anything else."""
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(("set", "cut", "insert")))
        if what == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del content[at : at + data.draw(st.integers(1, 8))]
        else:
            content[at:at] = data.draw(st.binary(max_size=8))
        if not content:
            break
    path = tmp_path / "damaged.onnx"
    path.write_bytes(bytes(content))
    try:
        found = read_graph_file(path)
    except ModelLoadError:
        return
    assert all(isinstance(name, str) for name in found.operators)


def test_what_onnx_can_parse_is_understood_alike(tmp_path: Path) -> None:
    """No operator of a damaged file that still parses is overlooked."""
    generator = np.random.default_rng(0)
    original = write_model(tmp_path, slow()).read_bytes()
    path = tmp_path / "damaged.onnx"
    compared = 0
    for _ in range(300):
        content = bytearray(original)
        content[generator.integers(len(content))] = generator.integers(256)
        try:
            model = onnx.load_from_string(bytes(content))
        except Exception:  # noqa: BLE001, S112 - protobuf's, or UnicodeDecodeError
            continue
        if not model.HasField("graph"):
            continue
        path.write_bytes(bytes(content))
        try:
            found = read_graph_file(path)
        except ModelLoadError:
            continue  # refusing more than onnx does is safe
        compared += 1
        assert operators_in(model.graph) - {""} <= found.operators
    assert compared > 100
