"""onnxedge for 64-bit ARM, installed and serving under emulation: a Raspberry Pi 4 and a Pi 5."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "arm64" / "try_under_emulation.sh"

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("ONNXEDGE_DEPLOY_TESTS") != "1",
        reason="ONNXEDGE_DEPLOY_TESTS is not 1: it needs root, mmdebstrap and a mirror of Debian",
    ),
    pytest.mark.skipif(
        not (ROOT / "runs" / "quick" / "bert").is_dir(), reason="runs/quick is not there: make models"
    ),
    pytest.mark.timeout(2500),
]


def test_five_models_answer_on_both_boards_what_they_answer_here() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False, timeout=2450)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, processor, products in (
        ("Raspberry Pi 4 Model B", "Cortex-A72", "none"),
        ("Raspberry Pi 5 Model B", "Cortex-A76", "asimddp"),
    ):
        _, _, told = done.stdout.partition(f"== {name}")
        assert f"Board: {name}" in told
        assert re.search(rf"Processor: \d+ × {processor}; dot products of bytes: {products}\n", told)
        for model in ("mobilenet", "resnet", "lstm", "gpt", "bert"):
            assert re.search(rf"^{model} .* ok$", told, re.MULTILINE)
