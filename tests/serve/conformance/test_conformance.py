"""Triton's answers, one row per behaviour, asked of the real server by tritonclient.

The rows' expectations were asked of a real Triton 2.51 with the same models in its Python backend; the last
column says which weren't, and where this server differs and why.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ROOT
from tests.serve.conformance.models import write_controlled, write_served

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

SECTIONS = {"4": "tensor data", "5": "parameters", "6": "streams", "7": "status codes", "8": "payloads"}
WIDTH = 98
GROUPS = "metadata,inference,shared-memory,model-config,model-repository,statistics,trace,logging"


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]
) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("served")
    other = tmp_path_factory.mktemp("controlled")
    served = serve("--model-repository", write_served(root), "--allow-client-shm=true")
    explicit = (
        "--model-repository",
        write_controlled(other),
        "--model-control-mode=explicit",
        "--load-model=kept",
    )
    controlled = serve(*explicit)
    restricted = serve(*explicit, f"--grpc-restricted-protocol={GROUPS}:key=secret")
    addresses = {
        "served": {"url": served.url, "metrics": f"http://127.0.0.1:{served.metrics_port}/metrics"},
        "controlled": {
            "url": controlled.url,
            "pid": controlled.process.pid,
            "config": {"backend": "onnxruntime"},
            "file": "model.onnx",
            "graph": str(other / "kept" / "1" / "model.onnx"),
        },
        "restricted": {"url": restricted.url},
    }
    asked = [sys.executable, "-m", "tests.serve.conformance.ask", json.dumps(addresses)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def line(row: dict[str, Any]) -> str:
    outcome = "ok  " if row["ok"] else "DIFF"
    asked = f"{row['section']:4} {row['via']:7} {row['expected'][0]:17} {row['what']:{WIDTH}}"
    return f"{outcome} {asked} {row['triton']}"


def test_the_table(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = sorted(rows, key=lambda row: [int(part) for part in row["section"].split(".")])
    with capsys.disabled():
        print(f"\n     §    via     {'expected':17} {'what':{WIDTH}} Triton 2.51")
        print(*map(line, rows), sep="\n")
        print(f"{len(rows)} behaviours, {sum(row['ok'] for row in rows)} as expected")
    different = [
        f"§{row['section']} {row['via']}: {row['what']}: expected {row['expected']}, got {row['got']}"
        for row in rows
        if not row["ok"]
    ]
    assert not different, "\n".join(different)


def test_each_section_is_asked_in_each_way(rows: list[dict[str, Any]]) -> None:
    counts = {section: sum(row["section"][0] == section for row in rows) for section in SECTIONS}
    assert min(counts.values()) >= 15, counts
    assert {row["via"] for row in rows} == {"sync", "aio", "stream", "message"}


def test_no_behaviour_is_listed_twice(rows: list[dict[str, Any]]) -> None:
    names = [(row["section"], row["what"]) for row in rows]
    assert sorted(names) == sorted(set(names))


def test_most_rows_were_asked_of_a_real_triton(rows: list[dict[str, Any]]) -> None:
    unusual = [row["triton"] for row in rows if row["triton"] != "same"]
    assert all(text.startswith(("differs: ", "not asked: ")) for text in unusual), unusual
    assert len(unusual) < len(rows) / 10
