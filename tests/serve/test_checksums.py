"""report.json's digests against the files beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from export.repository import Entry, write_entry
from serve.errors import ModelLoadError
from serve.loading.checksums import verify

if TYPE_CHECKING:
    from pathlib import Path

FILES = {"model.onnx": b"a graph", "model_int8.onnx": b"another", "golden.npz": b"samples"}


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A version as the exporter writes it."""
    return write_entry(tmp_path, Entry("m", 1, {"config.pbtxt": b""}, FILES, {"name": "m"}))


def set_report(version: Path, report: Any) -> None:
    (version / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))


@pytest.mark.parametrize("filename", ["model.onnx", "model_int8.onnx"])
def test_what_the_exporter_wrote_is_accepted(version: Path, filename: str) -> None:
    verify(version, filename)


def test_a_renamed_version_folder_is_accepted_and_still_checked(version: Path) -> None:
    other = version.rename(version.parent / "7")
    verify(other, "model.onnx")
    (other / "model.onnx").write_bytes(b"changed")
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        verify(other, "model.onnx")


def test_another_graph_is_refused_with_both_digests(version: Path) -> None:
    (version / "model.onnx").write_bytes(b"changed")
    with pytest.raises(ModelLoadError) as caught:
        verify(version, "model.onnx")
    for content in (b"changed", FILES["model.onnx"]):
        assert hashlib.sha256(content).hexdigest()[:12] in str(caught.value)
    assert "copy or export the model again" in str(caught.value)


def test_other_samples_are_refused(version: Path) -> None:
    (version / "golden.npz").write_bytes(b"changed")
    with pytest.raises(ModelLoadError, match=r"golden\.npz is not the file"):
        verify(version, "model.onnx")


def test_other_tensors_beside_the_graph_are_refused(version: Path) -> None:
    (version / "weights.bin").write_bytes(b"tensors")
    digests = {f"1/{name}": hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    set_report(version, {"sha256": {**digests, "1/weights.bin": hashlib.sha256(b"others").hexdigest()}})
    verify(version, "model.onnx")
    with pytest.raises(ModelLoadError, match=r"weights\.bin"):
        verify(version, "model.onnx", ["weights.bin"])


def test_files_that_are_not_used_are_not_read(version: Path) -> None:
    (version / "model_int8.onnx").write_bytes(b"changed")
    (version.parent / "config.pbtxt").write_text("max_batch_size: 4")
    verify(version, "model.onnx")


def test_without_samples_or_digests_there_is_nothing_to_hold_against(version: Path) -> None:
    (version / "golden.npz").unlink()
    verify(version, "model.onnx")
    (version / "model.onnx").write_bytes(b"changed")
    verify(version, "model_of_the_user.onnx")
    set_report(version, {"name": "m"})
    verify(version, "model.onnx")
    (version / "report.json").unlink()
    verify(version, "model.onnx")


@pytest.mark.parametrize(
    "report",
    [
        "{",
        "[1]",
        '"text"',
        "\\xff",
        "[" * 100_000,
        {"sha256": [1, 2]},
        {"sha256": {"1/model.onnx": 5}},
        {"sha256": {"1/model.onnx": "abc"}},
        {"sha256": None},
    ],
)
def test_a_malformed_report_is_refused(version: Path, report: Any) -> None:
    set_report(version, report)
    with pytest.raises(ModelLoadError, match=r"report\.json.*export the model again"):
        verify(version, "model.onnx")


def test_a_report_that_is_no_text_is_refused(version: Path) -> None:
    shutil.copy(version / "model.onnx", version / "report.json")
    (version / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelLoadError, match=r"report\.json can't be read"):
        verify(version, "model.onnx")
