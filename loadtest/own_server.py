"""A server of a load test's own: `onnxedge serve` as a process beside it, on free ports of the loopback."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest.target import TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PORT = re.compile(r"(SERVING: gRPC at|metrics at) .*:(\d+)")
_STOP_SECONDS = 60


@dataclass(frozen=True)
class OwnServer:
    """Where it listens."""

    url: str
    metrics_url: str


@contextmanager
def own_server(repository: Path) -> Iterator[OwnServer]:
    """Serve a model repository until the block ends.

    Raises:
        TargetError: the server didn't start; the message is the last line of its log.
    """
    command = [
        sys.executable, "-m", "serve", "serve", f"--model-repository={repository}", "--grpc-port=0",
        "--metrics-port=0", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own program
        try:
            ports, last = _ports(process)
            if "SERVING: gRPC at" not in ports:
                raise TargetError(f"the server of '{repository}' did not start: {last}")
            # A pipe that nobody reads would stop the server once it is full.
            threading.Thread(target=process.communicate, daemon=True).start()
            yield OwnServer(
                f"127.0.0.1:{ports['SERVING: gRPC at']}", f"http://127.0.0.1:{ports['metrics at']}/metrics"
            )
        finally:
            process.terminate()
            process.wait(_STOP_SECONDS)


def _ports(process: subprocess.Popen[str]) -> tuple[dict[str, str], str]:
    """What its log says until it serves, or ends; and the log's last line."""
    ports: dict[str, str] = {}
    line = ""
    assert process.stderr is not None
    for line in process.stderr:
        if found := _PORT.search(line):
            ports[found[1]] = found[2].strip('"')
        if "SERVING: gRPC at" in ports:
            break
    return ports, line.strip()
