"""Real parts for every test: ONNX graphs on disk, the server as a process of its own on free ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]

# A shell's background jobs ignore Ctrl-C, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class RunningServer:
    """A server process that answers."""

    process: subprocess.Popen[str]
    grpc_port: int
    metrics_port: int
    log: list[str] = field(default_factory=list)
    """Lines so far; all of them after `stop`."""
    reader: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def metrics(self) -> str:
        """The text of the metrics endpoint."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status. The rest of the log is in `log`."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        status = self.process.wait(60)
        if self.reader is not None:
            self.reader.join(30)
        return status


def start_server(*flags: str | Path) -> RunningServer:
    """Start `onnxedge serve` with the flags on free ports and wait until it says that it serves."""
    ports = ("--grpc-port=0", "--metrics-port=0", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", "serve", *ports, *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("ONNXEDGE_")},
    )
    server = RunningServer(process, 0, 0)
    assert process.stderr is not None
    for line in process.stderr:
        server.log.append(line)
        if "metrics at " in line:
            server.metrics_port = int(line.split("/metrics")[0].rsplit(":", 1)[1])
        if "SERVING: gRPC at " in line:
            server.grpc_port = int(line.rsplit(":", 1)[1].strip().strip('"'))
            # A pipe that nobody reads would stop the server once it is full.
            server.reader = threading.Thread(target=_read_on, args=(process.stderr, server.log), daemon=True)
            server.reader.start()
            return server
    process.stderr.close()
    raise AssertionError(f"the server ended with {process.wait()} before it served:\n{''.join(server.log)}")


def _read_on(stream: IO[str], lines: list[str]) -> None:
    with stream:
        lines.extend(stream)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., RunningServer]]:
    """Start servers that end with the session, if a test didn't stop them."""
    servers: list[RunningServer] = []

    def start(*flags: str | Path) -> RunningServer:
        servers.append(start_server(*flags))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()
