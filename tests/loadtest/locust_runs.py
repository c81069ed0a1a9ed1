"""locust as a user runs it, and a server that remembers when requests came."""

from __future__ import annotations

import csv
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
import pytest

from loadtest.stub import Behaviour, Stub
from loadtest.target import SERVICE
from tests.loadtest.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

LOCUST = (sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py")
DEADLINE = 30.0
QUARTILES = np.array([0.25, 0.5, 0.75])
LIKE_A_POISSON_PROCESS = pytest.approx((-np.log(1 - QUARTILES)).tolist(), rel=0.3)
TRIES = 4


def locust(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A test without a web page, to its end; all that it says is in `stdout`."""
    return subprocess.run(
        [*LOCUST, "--headless", "--only-summary", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
    )  # fmt: skip


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process of locust that ends with the block."""
    with subprocess.Popen(
        [*LOCUST, *map(str, arguments)],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def rows(prefix: Path) -> dict[str, dict[str, float]]:
    """locust's figures of a test that wrote --csv, by name; `Aggregated` is all together."""
    with prefix.with_name(f"{prefix.name}_stats.csv").open() as file:
        return {
            row.pop("Name"): {key: number(cell) for key, cell in row.items()} for row in csv.DictReader(file)
        }


def number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def sent_late(output: str) -> list[int]:
    """How many requests each process says that it sent."""
    return [int(count) for count in re.findall(r"(\d+) requests were sent late by", output)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def until(found: Callable[[], Any], what: str) -> Any:
    """Wait for what becomes true, and give it."""
    end = time.monotonic() + DEADLINE
    while not (value := found()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return value


class Probe(threading.Thread):
    """Counts who wants this machine's cores while its block runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._runnable: list[int] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
            self._runnable.append(int(running))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._ended.set()
        self.join()

    @property
    def quiet(self) -> bool:
        """Whether most of the time there were cores enough."""
        return float(np.mean(self._runnable)) <= (os.cpu_count() or 1)


def hold_to(attempt: Callable[[], object]) -> None:
    """Hold the best of some attempts to what only a machine keeps that does little else.

    Args:
        attempt: gives what was wrong, or nothing.
    """
    found: list[object] = []
    for _ in range(TRIES):
        with Probe() as probe:
            problem = attempt()
        if not problem:
            return
        found.append(problem if probe.quiet else None)
    if not any(found):
        pytest.skip(f"this machine is too busy: none of {TRIES} attempts had the cores that it needs")
    raise AssertionError(found)


class Recorder(Stub):
    """A stub that answers at once and remembers when each request came."""

    def __init__(self) -> None:
        super().__init__(Behaviour())
        self.times: list[int] = []

    def infer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.times.append(time.perf_counter_ns())
        return super().infer(request, context)

    def arrivals(self) -> NDArray[np.float64]:
        """Seconds from the first one on."""
        times = np.sort(np.array(self.times)) / 1e9
        since_first: NDArray[np.float64] = times - times[0]
        return since_first


@contextmanager
def recording() -> Iterator[tuple[Recorder, str]]:
    """A recorder that serves, and its url."""
    recorder = Recorder()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    handlers = grpc.method_handlers_generic_handler(SERVICE.removeprefix("/"), recorder.handlers())
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield recorder, f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def variation(arrivals: NDArray[np.float64]) -> float:
    """The coefficient of variation of the times between arrivals: 1 of a Poisson process, 0 of a clock."""
    gaps = np.diff(arrivals)
    return float(gaps.std() / gaps.mean())


def gap_quartiles(arrivals: NDArray[np.float64], rate: float) -> list[float]:
    """Of the times between arrivals, in units of their mean; a stall of the machine hardly changes them."""
    quartiles: list[float] = (np.quantile(np.diff(arrivals), QUARTILES) * rate).tolist()
    return quartiles
