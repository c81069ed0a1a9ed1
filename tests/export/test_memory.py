"""Resident memory, sessions and their providers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime import datasets

from export import latency
from export.errors import ExportError
from export.isolation import run_isolated
from export.memory import grown_bytes, resident_bytes
from export.session import Session, providers, usable_providers
from tests import graphs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.export.conftest import Exported

MEGABYTE = 1_000_000


def dense(size: int) -> bytes:
    """Rows of 256 times a matrix of ones."""
    weights = onnx.numpy_helper.from_array(np.ones((256, size), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "dense",
        [graphs.info("x", ["batch", 256])],
        [graphs.info("y", ["batch", size])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def test_memory_grows_with_the_weights_and_repeats() -> None:
    rows = {"x": np.ones((8, 256), np.float32)}
    small, again, large = (resident_bytes(dense(size), rows) for size in (4, 4, 40_000))
    assert small is not None
    assert again is not None
    assert large is not None
    assert abs(small - again) < MEGABYTE
    # 41 MB of weights, which onnxruntime keeps at least once and, packed, at most twice.
    assert 0.95 * 41 * MEGABYTE < large - small < 2.5 * 41 * MEGABYTE


def test_memory_of_a_file_and_of_its_content_agree(exported: Exported) -> None:
    path = exported.version / "model.onnx"
    with np.load(exported.version / "golden.npz") as golden:
        rows = {"image": golden["input.image"]}
    file, content = resident_bytes(path, rows), resident_bytes(path.read_bytes(), rows)
    assert file is not None
    assert content is not None
    assert abs(file - content) < 1.5 * MEGABYTE
    assert file > path.stat().st_size


def test_memory_of_a_graph_of_strings(tmp_path: Path) -> None:
    path = graphs.write_model(tmp_path, graphs.identity(["n"], TensorProto.STRING))
    grown = resident_bytes(path, {"x": np.array(["one", "zwei"], object)})
    assert grown is not None
    assert grown > 0


def test_memory_of_what_can_not_run_is_an_error() -> None:
    with pytest.raises(ExportError, match="can't load the graph"):
        grown_bytes(b"nothing", {})
    with pytest.raises(ExportError, match="input 'x' is missing"):
        grown_bytes(dense(4), {"other": np.ones((1, 256), np.float32)})


def test_without_a_figure_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resident_bytes(b"nothing", {}) is None
    monkeypatch.setattr("export.memory.SECONDS", 0.01)
    assert resident_bytes(dense(4), {"x": np.ones((1, 256), np.float32)}) is None


def test_a_measurement_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, none stays behind, however the process ends."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert resident_bytes(dense(4), {"x": np.ones((1, 256), np.float32)})


def test_a_child_that_hangs_or_dies_is_an_error(tmp_path: Path) -> None:
    path = graphs.write_model(tmp_path, graphs.slow())
    np.savez(tmp_path / "rows.npz", n=np.array(10**9))
    arguments = (str(path), str(tmp_path / "rows.npz"))
    with pytest.raises(ExportError, match="not done with the graph after 2 s"):
        run_isolated("export.memory", arguments, 2)
    with pytest.raises(ExportError, match="no_such_module"):
        run_isolated("export.no_such_module", (), 10)


def test_a_provider_that_onnxruntime_drops_in_silence_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu without CUDA's libraries: it lists the provider, and takes the CPU's instead."""
    claimed = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    original = onnxruntime.InferenceSession
    monkeypatch.setattr("export.session.onnxruntime.get_available_providers", lambda: claimed)
    monkeypatch.setattr(
        "export.session.onnxruntime.InferenceSession",
        lambda graph, options, providers: original(
            graph, options, providers=[p for p in providers if "CUDA" not in p] or ["CPUExecutionProvider"]
        ),
    )
    providers.cache_clear()
    try:
        assert usable_providers() == ("CPUExecutionProvider",)
        assert "fell back to CPUExecutionProvider" in str(providers()["CUDAExecutionProvider"])
        assert "service" in str(providers()["AzureExecutionProvider"])
        with pytest.raises(ExportError, match="CUDAExecutionProvider"):
            Session(dense(4), "CUDAExecutionProvider")
    finally:
        providers.cache_clear()


def test_a_provider_that_is_not_compiled_in_is_named() -> None:
    with pytest.raises(ExportError, match=r"has only .*CPUExecutionProvider"):
        Session(dense(4), "NoSuchExecutionProvider")


@pytest.mark.parametrize("provider", usable_providers())
def test_every_usable_provider_runs_the_exported_graph(provider: str, exported: Exported) -> None:
    with np.load(exported.version / "golden.npz") as golden:
        image, logits = golden["input.image"], golden["output.logits"]
        tolerance = float(golden["tolerance.model.onnx.logits"])
    found = Session(exported.version / "model.onnx", provider).run({"image": image})["logits"]
    assert np.abs(found - logits).max() <= 2 * tolerance


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x08\x07\x12\xff", dense(4)[:-20], dense(4).replace(b"MatMul", b"M\xff\xfeMul")],
    ids=["empty", "text", "cut field", "cut weights", "not UTF-8"],
)
def test_what_onnxruntime_can_not_load_is_one_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="can't load the graph") as caught:
        Session(content)
    assert "\n" not in str(caught.value)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.onnx: onnxruntime can't load"):
        Session(path)


def test_a_fixed_batch_is_filled_up_and_cut(tmp_path: Path) -> None:
    graph = graphs.scaled(2.0)
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    loaded = Session(graphs.write_model(tmp_path, graph))
    assert loaded.batch_size == 4
    assert loaded.input_shapes == {"x": (4, 4)}
    assert loaded.input_types == {"x": "tensor(float)"}
    rows = np.arange(28, dtype=np.float32).reshape(7, 4)
    assert np.array_equal(loaded.run_in_batches({"x": rows})["y"], 2 * rows)


def test_a_graph_without_a_batch_axis_runs_but_not_in_batches(tmp_path: Path) -> None:
    loaded = Session(graphs.write_model(tmp_path, graphs.slow()))
    assert (loaded.batch_size, loaded.input_shapes) == (None, {"n": ()})
    assert loaded.run({"n": np.array(2)})["y"].shape == (128, 128)
    with pytest.raises(ExportError, match="no axis"):
        loaded.run_in_batches({"n": np.array(2)})
    fixed = Session(graphs.write_model(tmp_path / "fixed", graphs.identity([3, 2])))
    assert fixed.batch_size == 3
    iris = Session(datasets.get_example("logreg_iris.onnx"))
    with pytest.raises(ExportError, match="it has no batch axis"):
        iris.run_in_batches({"float_input": np.ones((3, 2), np.float32)})


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    loaded = Session(graphs.write_model(tmp_path, graphs.gather()))
    with pytest.raises(ExportError, match=r"can't run the graph: .*out of data bounds"):
        loaded.run({"x": np.array([9])})
    assert loaded.run({"x": np.array([3]), "unused": np.array([1])})["y"] == 3


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Gets an entry for each turn of a measurement that only ends by what it measures."""
    taken: list[float] = []
    turn = latency._turn

    def counted(loaded: Session, rows: dict[str, np.ndarray]) -> list[float]:
        seconds = turn(loaded, rows)
        taken.append(sum(seconds))
        return seconds

    monkeypatch.setattr(latency, "_turn", counted)
    monkeypatch.setattr(latency, "LIMIT_SECONDS", 1e9)
    return taken


def test_turns_end_when_the_medians_have_settled(turns: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = {name: Session(dense(4)) for name in "ab"}
    # A clock that only moves when it is read: every run takes as long as any other.
    monkeypatch.setattr("export.latency.time.perf_counter", map(float, itertools.count()).__next__)
    medians = latency.measure(sessions, {"x": np.ones((1, 256), np.float32)}, 1)
    assert medians == {"a": 1000.0, "b": 1000.0}
    assert len(turns) == 2 * latency.FEWEST_ROUNDS


def test_turns_go_on_while_the_medians_move(turns: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.cycle((1.0, 2.0, 5.0, 3.0, 9.0, 4.0, 7.0)))
    monkeypatch.setattr("export.latency.time.perf_counter", clock.__next__)
    latency.measure({"a": Session(dense(4))}, {"x": np.ones((2, 256), np.float32)}, 2)
    assert len(turns) == latency.ROUNDS
