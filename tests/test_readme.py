"""The README as a new user runs it: its `sh` and `python` blocks, in order, on a copy of what git tracks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
EXECUTED = [(language, text) for language, text in BLOCKS if language in ("sh", "python")]
# The test environment is the one that the README's `make` would make, so it is lent to the copy.
VENV = Path(sys.executable).parents[1]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


class Copy:
    """A checkout of its own, with ports of its own in place of the README's."""

    def __init__(self, folder: Path) -> None:
        tracked = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - git is where make is
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in tracked:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(VENV)
        os.utime(VENV / "installed")
        self.folder = folder
        self.ports = dict(zip(("8001", "8002", "9001", "9002"), free_ports(4), strict=True))
        grpc, metrics = self.ports["8001"], self.ports["8002"]
        self.environment = {
            **os.environ,
            "ONNXEDGE_GRPC_PORT": str(grpc),
            "ONNXEDGE_METRICS_PORT": str(metrics),
            "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
        }

    def command(self, language: str, text: str) -> list[str]:
        for port, own in self.ports.items():
            text = text.replace(port, str(own))
        for command in ("infer mobilenet", "generate gpt_generate"):
            text = text.replace(command, f"{command} --url localhost:{self.ports['8001']}")
        for duration in ("--duration 3", "--duration 5"):
            text = text.replace(duration, f"{duration} --url localhost:{self.ports['8001']}")
        return ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]

    def run(self, language: str, text: str) -> str:
        done = subprocess.run(
            self.command(language, text),
            cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def served(copy: Copy) -> Iterator[Copy]:
    """`make serve`, the first block, until it serves; Ctrl-C at the end."""
    assert EXECUTED[0] == ("sh", "make serve\n")
    process = subprocess.Popen(
        copy.command(*EXECUTED[0]),
        cwd=copy.folder, env=copy.environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if "SERVING" in line:
            break
    else:
        raise AssertionError("".join(log))
    yield copy
    os.killpg(process.pid, signal.SIGINT)
    process.stderr.close()
    process.wait(60)


@pytest.mark.timeout(600)
def test_every_block_does_what_the_readme_says(served: Copy) -> None:
    for language, text in EXECUTED[1:]:
        if text == "make test\n":  # this very run; that it would start is all that can be tried here
            assert "pytest" in served.run("sh", "make --dry-run test")
            continue
        if text == "make loadtest\n":
            assert_a_verdict_is_given(served)
            continue
        output = served.run(language, text)
        if "onnxedge infer" in text:
            assert output.splitlines()[0].split(maxsplit=1)[1] == "Ankle boot"
        if "loadtest" in text:
            assert "throughput" in output
        if "loadtest compare" in text:
            assert "95 % interval" in output
            assert "</html>" in (served.folder / "before.html").read_text()
        if "lstm_sequence" in text:
            assert output.splitlines()[-1] == "(1, 96, 7)"
        if "curl" in text:
            assert 'nv_inference_request_success{model="mobilenet",version="1"}' in output


def assert_a_verdict_is_given(served: Copy) -> None:
    """Which one depends on this machine: whether it kept the targets and let the load be sent on time."""
    done = subprocess.run(
        served.command("sh", "make loadtest"),
        cwd=served.folder, env=served.environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    verdict = re.search(r"^verdict: (PASSED|FAILED|INVALID)$", done.stdout, re.MULTILINE)
    assert verdict, done.stdout + done.stderr
    assert (done.returncode == 0) == (verdict[1] == "PASSED")
    row = r"^(\w[\w, ]*?) +\d+\.\d +\d+\.\d+ +\d+\.\d+ +(\d+) +\w+$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert {name for name, _ in rows} >= {"mobilenet", "resnet", "lstm", "bert", "gpt", "gpt, token by token"}
    assert {errors for _, errors in rows} == {"0"}, done.stdout
    assert len(list((served.folder / "runs" / "loadtest").glob("*.html"))) == len(rows)


@pytest.mark.timeout(120)
def test_the_second_make_serve_reuses_what_is_there(served: Copy) -> None:
    plan = served.run("sh", "make --dry-run serve")
    assert "-m train" not in plan
    assert "-m export" not in plan
    assert "onnxedge serve" in plan


def test_readme_names_every_kind_of_block() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
