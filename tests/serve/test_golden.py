"""Golden samples: what a provider must compute before a client is answered."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from export.repository import golden as golden_bytes
from serve.errors import ModelLoadError
from serve.loading import golden
from serve.model.model_config import resolve
from serve.pb import model_config_pb2 as pb
from serve.runtime.session import Session, SessionSettings
from tests.graphs import FLOAT, identity, info, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

ROWS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def loaded(folder: Path, graph: onnx.GraphProto) -> tuple[Session, Any, Path]:
    """Session, config and version folder of a graph."""
    path = write_model(folder, graph)
    session = Session(path, SessionSettings())
    config = resolve(pb.ModelConfig(), folder.name, session.inputs, session.outputs, {})
    return session, config, path.parent


def doubled(shape: tuple[int | str, ...] = ("n", 4), onnx_type: int = FLOAT) -> onnx.GraphProto:
    """y = x + x."""
    node = helper.make_node("Add", ["x", "x"], ["y"])
    return helper.make_graph([node], "doubled", [info("x", shape, onnx_type)], [info("y", shape, onnx_type)])


def write(
    version: Path,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    tolerance: float | None = 1e-6,
) -> None:
    tolerances = {} if tolerance is None else {"model.onnx": dict.fromkeys(outputs, tolerance)}
    (version / "golden.npz").write_bytes(golden_bytes(inputs, outputs, tolerances))


def check(session: Session, config: Any, version: Path) -> golden.Golden | None:
    return golden.check(session, config, version, "model.onnx")


def test_a_graph_that_computes_the_same_passes(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, doubled())
    write(version, {"x": ROWS}, {"y": 2 * ROWS})
    found = check(session, config, version)
    assert found is not None
    assert (found.rows, found.differences) == (3, {"y": 0.0})
    assert found.allowed["y"] == pytest.approx(1e-6 + 2 * golden.ROUNDING)


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, doubled())
    expected = 2 * ROWS
    expected[2, 1] += 0.25
    write(version, {"x": ROWS}, {"y": expected}, tolerance=0.1)
    with pytest.raises(
        ModelLoadError,
        match=r"output 'y' of model\.onnx is off by 0\.25 on CPUExecutionProvider, allowed 0\.1",
    ):
        check(session, config, version)


@pytest.mark.parametrize(("off", "passes"), [(0.019, True), (0.021, False)])
def test_the_tolerance_is_the_one_of_the_file(tmp_path: Path, off: float, *, passes: bool) -> None:
    session, config, version = loaded(tmp_path, doubled())
    write(version, {"x": ROWS}, {"y": 2 * ROWS + np.float32(off)}, tolerance=0.02)
    if passes:
        assert check(session, config, version) is not None
    else:
        with pytest.raises(ModelLoadError):
            check(session, config, version)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_differs_from_every_number(tmp_path: Path, value: float) -> None:
    session, config, version = loaded(tmp_path, doubled())
    inputs = ROWS.copy()
    inputs[0, 0] = value
    write(version, {"x": inputs}, {"y": 2 * ROWS}, tolerance=1e6)
    with pytest.raises(ModelLoadError, match="off by inf"):
        check(session, config, version)


def test_what_is_no_number_equals_itself(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, doubled())
    inputs = ROWS.copy()
    inputs[0, :2] = np.nan, np.inf
    write(version, {"x": inputs}, {"y": 2 * inputs})
    assert check(session, config, version) is not None


def test_a_graph_of_a_fixed_batch_gets_whole_batches(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, doubled((2, 4)))
    write(version, {"x": ROWS}, {"y": 2 * ROWS})
    assert check(session, config, version) is not None
    write(version, {"x": ROWS}, {"y": 3 * ROWS})
    with pytest.raises(ModelLoadError, match="off by"):
        check(session, config, version)


def test_integers_and_bfloat16_are_compared_as_numbers(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path / "int", doubled(("n", 4), TensorProto.INT64))
    rows = np.arange(8).reshape(2, 4)
    write(version, {"x": rows}, {"y": 2 * rows + 3}, tolerance=2)
    with pytest.raises(ModelLoadError, match="off by 3"):
        check(session, config, version)
    session, config, version = loaded(tmp_path / "bf16", identity(["n"], TensorProto.BFLOAT16))
    bits = (np.array([1.0, 2.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    other = (np.array([1.0, 2.5], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    write(version, {"x": bits}, {"y": bits})
    assert check(session, config, version) is not None
    write(version, {"x": bits}, {"y": other})
    with pytest.raises(ModelLoadError, match=r"off by 0\.5"):
        check(session, config, version)


def test_text_is_equal_or_not(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, identity(["n"], TensorProto.STRING))
    texts = np.array(["a", "bäh", ""])
    write(version, {"x": texts}, {"y": texts}, tolerance=0)
    assert check(session, config, version) is not None
    write(version, {"x": texts}, {"y": np.array(["a", "bah", ""])}, tolerance=0)
    with pytest.raises(ModelLoadError, match="off by 1"):
        check(session, config, version)


def test_without_samples_or_a_tolerance_nothing_is_checked(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, doubled())
    assert check(session, config, version) is None
    write(version, {"x": ROWS}, {"y": 3 * ROWS}, tolerance=None)
    assert check(session, config, version) is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "problem"),
    [
        ({"z": ROWS}, {"y": ROWS}, r"has the inputs \['z'\], the graph takes \['x'\]"),
        ({"x": ROWS, "z": ROWS}, {"y": ROWS}, "has the inputs"),
        ({"x": ROWS}, {"y": ROWS[:2]}, "expected as many in each"),
        ({"x": ROWS[:0]}, {"y": ROWS[:0]}, "expected as many in each"),
        ({"x": ROWS}, {"y": ROWS[:, :2]}, "has shape"),
        ({"x": ROWS[:, :2]}, {"y": ROWS}, "can't be run on CPUExecutionProvider"),
        ({"x": ROWS.astype(np.float64)}, {"y": ROWS}, "can't be run"),
    ],
)
def test_samples_of_another_graph_are_refused(
    tmp_path: Path, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray], problem: str
) -> None:
    session, config, version = loaded(tmp_path, doubled())
    write(version, inputs, outputs)
    with pytest.raises(ModelLoadError, match=problem):
        check(session, config, version)


def _pickled() -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "input.x": np.array([{"a": 1}], dtype=object),
        "output.y": ROWS,
        "tolerance.model.onnx.y": np.float32(1),
    }
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _bomb() -> bytes:
    """Small, and large once it is unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("input.x.npy", "w") as f:
        for _ in range(golden.MAX_BYTES // (1 << 24) + 1):
            f.write(bytes(1 << 24))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "can't be read"),
        (b"garbage", "can't be read"),
        (_pickled(), "can't be read"),
        (_bomb(), "the limit is"),
        (golden_bytes({"x": ROWS}, {"y": ROWS}, {"model.onnx": {"y": 1.0}})[:-40], "can't be read"),
    ],
    ids=["empty", "garbage", "pickled", "bomb", "cut"],
)
def test_unreadable_samples_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    session, config, version = loaded(tmp_path, doubled())
    (version / "golden.npz").write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"golden\.npz.*{problem}"):
        check(session, config, version)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    session, config, version = loaded(tmp_path, doubled())
    write(version, {"x": ROWS}, {"y": 2 * ROWS})
    content = (version / "golden.npz").read_bytes()
    place = content.index((2 * ROWS).tobytes())
    (version / "golden.npz").write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
    with pytest.raises(ModelLoadError, match=r"golden\.npz can't be read \(Bad CRC-32"):
        check(session, config, version)
