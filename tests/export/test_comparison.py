"""`python -m export compare`: what it measures, on what rows, and when it refuses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.difference import output_difference
from export.errors import ExportError
from export.inspection.compare import compare, main
from export.session import Session
from tests import graphs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.export.conftest import Exported


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of latency is enough to see that there is one."""
    monkeypatch.setattr("export.latency.LIMIT_SECONDS", 0.0)


def test_int8_against_fp32(exported: Exported) -> None:
    found = compare(exported.version / "model.onnx", exported.version / "model_int8.onnx")
    fp32, int8 = found.inspections
    assert int8.file_bytes < fp32.file_bytes / 2
    assert (fp32.quantized_work, int8.quantized_work) == (0, 1)
    assert found.operators["QuantizeLinear"][0] == 0 < found.operators["QuantizeLinear"][1]
    assert found.signature == ()
    assert found.samples == str(exported.version / "golden.npz")
    assert found.latency_ms.keys() == {"1", "8"}
    assert all(median > 0 for medians in found.latency_ms.values() for median in medians)
    assert all(size and size > 1_000_000 for size in found.resident_bytes)

    with np.load(exported.version / "golden.npz") as golden:
        image = golden["input.image"]
    a, b = (Session(exported.version / name).run({"image": image})["logits"]
            for name in ("model.onnx", "model_int8.onnx"))  # fmt: skip
    logits = found.outputs["logits"]
    assert logits.max_abs == pytest.approx(np.abs(a - b).max())
    assert logits.relative == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert logits.top1 == np.mean(a.argmax(1) == b.argmax(1))


def test_command_line_prints_both_and_holds_the_tolerance(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    # The entry stands for its default graph, the one that was faster when it was exported.
    assert main([str(exported.version / "model.onnx"), str(exported.entry), "--tolerance", "10"]) == 0
    default = re.search(r'default_model_filename: "(.*)"', (exported.entry / "config.pbtxt").read_text())
    assert default is not None
    assert f"B  {exported.version / default[1]}" in capsys.readouterr().out
    paths = [str(exported.version / name) for name in ("model.onnx", "model_int8.onnx")]
    assert main([*paths, "--tolerance", "10"]) == 0
    printed = capsys.readouterr().out
    assert f"B  {paths[1]}" in printed
    for label in (
        "file",
        "parameters",
        "resident memory",
        "latency, batch 1",
        "latency, batch 8",
        "logits: max",
    ):
        assert f"\n{label}" in printed.replace("\n  ", "\n"), printed
    assert main([*paths, "--tolerance", "1e-7", "--json"]) == 1
    captured = capsys.readouterr()
    assert "output logits: relative error" in captured.err
    content = json.loads(captured.out)
    assert content["outputs"]["logits"]["cosine"] > 0.9
    assert content["inspections"][1]["quantized_parameters"] > 0.9


def save(path: Path, nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_what_only_one_has_is_said_and_the_rest_compared(tmp_path: Path) -> None:
    both = graphs.write_model(tmp_path / "both", graphs.addition())
    info = graphs.info
    one = save(
        tmp_path / "one.onnx",
        [helper.make_node("Add", ["a", "a"], ["sum"]), helper.make_node("Neg", ["a"], ["minus"])],
        [info("a", ["n", 3])],
        [info("sum", ["n", 3]), info("minus", ["n", 3])],
    )
    found = compare(both, one)
    assert found.signature == (
        "input b: only in A", "output difference: only in A", "output minus: only in B",
    )  # fmt: skip
    assert found.outputs.keys() == {"sum"}
    assert found.outputs["sum"].relative > 0
    assert found.operators == {"Neg": (0, 1), "Sub": (1, 0)}
    assert found.samples == "random rows"


def test_nothing_in_common_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = graphs.write_model(tmp_path / "first", graphs.addition())
    second = graphs.write_model(tmp_path / "second", graphs.scaled(2.0))
    assert main([str(first), str(second)]) == 1
    assert "no input in common (a, b and x)" in capsys.readouterr().err
    outputs = [graphs.info("z", ["n", 4])]
    other = [helper.make_node("Neg", ["x"], ["z"])]
    third = save(tmp_path / "third.onnx", other, [graphs.info("x", ["n", 4])], outputs)
    with pytest.raises(ExportError, match="no output to compare: output y: only in A; output z: only in B"):
        compare(second, third)


def test_types_of_another_width_are_fed_the_same_numbers(tmp_path: Path) -> None:
    wide = graphs.write_model(tmp_path / "wide", graphs.identity(["n", 4], TensorProto.DOUBLE))
    narrow = graphs.write_model(tmp_path / "narrow", graphs.identity(["n", 4]))
    found = compare(wide, narrow)
    assert found.signature == ("input x: DOUBLE [n, 4] in A, FLOAT [n, 4] in B",)
    assert 0 < found.outputs["y"].relative < 1e-6
    text = graphs.write_model(tmp_path / "text", graphs.identity(["n", 4], TensorProto.STRING))
    with pytest.raises(ExportError, match="'x' is STRING"):
        compare(wide, text)


def test_integers_are_drawn_from_a_range_that_the_graphs_take(tmp_path: Path) -> None:
    path = graphs.write_model(tmp_path, graphs.gather())  # of a table of four
    found = compare(path, path)
    assert found.samples == "random rows (integers below 2)"
    assert found.outputs["y"].equal == 1


def test_rows_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graphs.write_model(tmp_path, graphs.gather())
    np.savez(tmp_path / "good.npz", x=np.array([3, 1, 2]))
    assert compare(path, path, inputs=tmp_path / "good.npz").samples == str(tmp_path / "good.npz")
    np.savez(tmp_path / "bad.npz", x=np.array([7]))
    np.savez(tmp_path / "other.npz", y=np.array([1]))
    (tmp_path / "text.npz").write_text("no archive")
    errors = {
        "bad": "out of data bounds", "other": "no rows for input 'x'", "text": "not an .npz file",
        "none": "not an .npz file",
    }  # fmt: skip
    for name, message in errors.items():
        assert main([str(path), str(path), "--inputs", str(tmp_path / f"{name}.npz")]) == 1
        assert message in capsys.readouterr().err


def test_fixed_batches_and_no_batch(tmp_path: Path) -> None:
    free = graphs.write_model(tmp_path / "free", graphs.identity(["n", 4]))
    four = graphs.write_model(tmp_path / "four", graphs.identity([4, 4]))
    eight = graphs.write_model(tmp_path / "eight", graphs.identity([8, 4]))
    assert compare(free, four).latency_ms.keys() == {"4"}
    np.savez(tmp_path / "rows.npz", x=np.ones((6, 4), np.float32))
    found = compare(four, eight, inputs=tmp_path / "rows.npz")
    assert (found.outputs["y"].equal, found.latency_ms) == (1, {})
    assert found.notes[0].startswith("no latency: the batch is fixed")
    slow = graphs.write_model(tmp_path / "slow", graphs.slow())
    np.savez(tmp_path / "turns.npz", n=np.array(2))
    assert compare(slow, slow, inputs=tmp_path / "turns.npz").latency_ms.keys() == {"all rows"}


def test_symbolic_axes_of_random_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graphs.write_model(tmp_path, graphs.identity(["batch", "time"]))
    found = compare(path, path, sizes={"time": 5})
    assert [inspection.sizes for inspection in found.inspections] == [{"batch": 1, "time": 5}] * 2
    assert not [note for inspection in found.inspections for note in inspection.notes]
    assert main([str(path), str(path), "--shape", "width=5"]) == 1
    assert "neither graph has such" in capsys.readouterr().err


def test_difference_of_numbers() -> None:
    original = np.array([[1.0, 2.0], [-4.0, 0.0]], np.float32)
    found = output_difference(original + np.array([[0, 0.5], [0, 0]], np.float32), original)
    assert (found.max_abs, found.mean_abs, found.relative) == (0.5, 0.125, 0.125)
    assert (found.equal, found.top1) == (0.75, 1)
    assert output_difference(-original, original).cosine == pytest.approx(-1)
    assert output_difference(-original, original).top1 == 0


def test_difference_knows_infinities_and_nan() -> None:
    original = np.array([np.inf, np.nan, 1.0, -np.inf])
    assert output_difference(original, original).relative == 0
    for worse in ([np.nan, np.nan, 1.0, -np.inf], [np.inf, np.nan, np.inf, -np.inf], [np.inf, 0, 1, np.inf]):
        assert output_difference(np.array(worse), original).relative == np.inf


@pytest.mark.parametrize(
    ("found", "original"),
    [
        (np.array(["a", "b"], object), np.array(["a", "c"], object)),
        (np.array([True, False]), np.array([True, True])),
    ],
)
def test_difference_of_text_and_truth_values(found: np.ndarray, original: np.ndarray) -> None:
    difference = output_difference(found, original)
    assert (difference.equal, difference.relative, difference.max_abs) == (0.5, 0.5, None)


def test_difference_of_nothing() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert output_difference(empty, empty).relative == 0


def test_an_infinite_difference_is_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = [graphs.info("x", ["n", 4])], [graphs.info("y", ["n", 4])]
    zero = [helper.make_node("Sub", ["x", "x"], ["z"])]
    one = save(tmp_path / "one.onnx", [*zero, helper.make_node("Exp", ["z"], ["y"])], *info)
    nan = save(tmp_path / "nan.onnx", [*zero, helper.make_node("Div", ["z", "z"], ["y"])], *info)
    assert main([str(one), str(nan), "--json", "--tolerance", "100"]) == 1
    assert json.loads(capsys.readouterr().out)["outputs"]["y"]["relative"] is None


def test_sizes_that_are_not_of_the_rows_are_mentioned(tmp_path: Path) -> None:
    path = graphs.write_model(tmp_path, graphs.identity(["n", "time"]))
    np.savez(tmp_path / "rows.npz", x=np.ones((2, 5), np.float32))
    (note,) = compare(path, path, inputs=tmp_path / "rows.npz", sizes={"time": 3}).notes
    assert note == f"--shape is of the work; answers and latencies are of {tmp_path / 'rows.npz'}'s sizes"
    assert compare(path, path, inputs=tmp_path / "rows.npz").notes == ()
    assert compare(path, path, sizes={"time": 3}).notes == ()
