"""What `pip install .` brings to a device."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from serve import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        return opened


def test_only_the_server_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"serve", f"onnxedge-{__version__}.dist-info"}
    assert "serve/pb/grpc_service_pb2.py" in wheel.namelist()
    assert "serve/py.typed" in wheel.namelist()


def test_neither_torch_nor_onnx_is_required(wheel: zipfile.ZipFile) -> None:
    with zipfile.ZipFile(str(wheel.filename)) as opened:
        metadata = message_from_bytes(opened.read(f"onnxedge-{__version__}.dist-info/METADATA"))
        entry_points = opened.read(f"onnxedge-{__version__}.dist-info/entry_points.txt").decode()
    required = {
        re.split(r"[<>=;,]", line)[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert required == {
        "grpcio", "grpcio-health-checking", "grpcio-reflection", "numpy", "onnxruntime", "prometheus-client",
        "protobuf",
    }  # fmt: skip
    assert "onnxedge = serve.__main__:main" in entry_points
