"""A stub whose times are known, the real server, and the command line."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loadtest.commands.selfcheck import stub
from tests.graphs import scaled, slow, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start_stub() -> Iterator[Callable[..., str]]:
    """Start stubs with the flags of `python -m loadtest.stub`; the url of each."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(stub(*flags))


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]) -> RunningServer:
    """The real server with `tiny`, and `slow`, whose run takes as long as its input says."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "tiny", scaled(1))
    write_model(root / "slow", slow())
    return serve(
        "--model-repository", root, "--max-request-bytes=4096", "--model-control-mode=explicit",
        "--load-model=tiny", "--load-model=slow",
    )  # fmt: skip


def loadtest(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python -m loadtest` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
