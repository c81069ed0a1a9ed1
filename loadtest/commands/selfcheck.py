"""`python -m loadtest selfcheck`: what this client adds to a latency here, and how much it can send.

It asks a stub in a process of its own that answers at once, so what is left is the client, gRPC, the loopback
and the stub's own share. Nothing is subtracted from other runs: who reads their figures should know these.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadtest.commands.run import parse as parse_run
from loadtest.commands.session import CommandError, Session, guarded
from loadtest.flags import settings_of, specs_of
from loadtest.machine import describe_machine
from loadtest.report.terminal import table
from loadtest.run import run
from loadtest.search import Probe, Search
from loadtest.stub import MODEL, SERVING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.figures import Figures
    from loadtest.result import RunResult

_RATES = (100, 500, 1000, 2000)
_FIRST_RATE, _MOST = 500.0, 100_000.0
_PRECISION = 0.05


def main(arguments: list[str]) -> int:
    """Check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest selfcheck", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="of the load generator (default: 1)")
    options = parser.parse_args(arguments)
    return guarded("loadtest selfcheck", lambda: _check(options))


def _check(options: argparse.Namespace) -> int:
    machine = describe_machine()
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}, {machine['system']}")
    with stub() as url:
        check = _Check(url, options)
        alone = check.run("--users=1").total
        print(table(_rows(alone, check)))
        print(
            f"\nfloor: a request that takes no time reads as {alone.latency.percentile(50):.3f} ms (median, "
            f"one at a time), {alone.latency.percentile(99):.3f} ms at p99"
        )
        ceiling = Search(check.probe, _PRECISION, 1).run(_FIRST_RATE, _MOST)
    last = next((probe.why for probe in reversed(ceiling.probes) if not probe.kept), "nothing broke it")
    if ceiling.rate < _FIRST_RATE / 8:
        print(f"ceiling: none that can be believed: {last}")
        return 1
    print(
        f"ceiling: {ceiling.rate:.0f} requests/s with {options.processes} "
        f"process{'es' if options.processes > 1 else ''}; beyond it: {last}"
    )
    return 0


def _rows(alone: Figures, check: _Check) -> list[list[str]]:
    header = [
        "load",
        "latency p50",
        "p99",
        "p99.9 ms",
        "sent late by p50",
        "p99",
        "p99.9 ms",
        "of a core",
        "valid",
    ]
    rows = [header, ["one at a time", *_times(alone, "latency"), "-", "-", "-", "", ""]]
    for rate in _RATES:
        result = check.run(f"--rate={rate}")
        rows.append([
            f"{rate} requests/s", *_times(result.total, "latency"), *_times(result.total, "lag"),
            f"{result.validity.busiest_core:.0%}", "yes" if result.validity.valid else "no",
        ])  # fmt: skip
    return rows


def _times(figures: Figures, which: str) -> list[str]:
    return [f"{getattr(figures, which).percentile(percent):.3f}" for percent in (50.0, 99.0, 99.9)]


class _Check:
    """Runs against a stub."""

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url = url
        self._options = options

    def run(self, load: str, seed: int = 0) -> RunResult:
        """One run of a load."""
        options = parse_run([
            f"--model={MODEL}", f"--url={self._url}", load, f"--duration={self._options.seconds}", "--quiet",
            f"--processes={self._options.processes}", "--metrics-url=", f"--seed={seed}",
        ])  # fmt: skip
        settings = settings_of(options)
        with Session(options, specs_of(options), settings) as session:
            return run(session.setting, settings)

    def probe(self, rate: float, seed: int) -> Probe:
        """Whether a rate can be sent, and believed."""
        result = self.run(f"--rate={rate}", seed)
        reasons = result.validity.reasons
        return Probe(
            rate, not reasons and not result.total.failed, why=reasons[0] if reasons else "it failed"
        )


@contextmanager
def stub(*flags: str) -> Iterator[str]:
    """A stub in a process of its own; its url.

    Raises:
        CommandError: it didn't start.
    """
    command = [sys.executable, "-m", "loadtest.stub", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - this program
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(SERVING):
                raise CommandError("the stub did not start")
            yield f"127.0.0.1:{line.removeprefix(SERVING).strip()}"
        finally:
            process.terminate()
