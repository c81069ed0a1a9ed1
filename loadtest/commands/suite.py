"""`python -m loadtest suite FILE.toml`: the runs of a file, and a verdict against its targets."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.commands import run as run_command
from loadtest.commands.session import Session, guarded
from loadtest.flags import settings_of, specs_of
from loadtest.overload import run_overload
from loadtest.own_server import own_server
from loadtest.payload import load_of
from loadtest.report.csv_file import write_csv
from loadtest.report.html import write_html
from loadtest.report.terminal import condition_line, failures, table
from loadtest.result import write_result
from loadtest.run import run
from loadtest.settings import SettingsError
from loadtest.target import Questions, add_target_flags, target_of
from loadtest.validity import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.result import RunResult

_SERVER_FLAGS = ("url", "token_file", "root_cert", "client_cert", "client_key", "ssl_server_name", "wait")


def main(arguments: list[str]) -> int:
    """Run them all; the exit status: 1 if one failed, 3 if one can't be believed."""
    parser = argparse.ArgumentParser(prog="python -m loadtest suite", description=__doc__)
    parser.add_argument("file", type=Path, help="TOML: [[run]] tables whose keys are the flags of a run")
    add_target_flags(parser)
    parser.add_argument(
        "--serve",
        type=Path,
        metavar="FOLDER",
        help="of models: start a server for this suite, in place of --url",
    )
    parser.add_argument("--metrics-url", metavar="URL", help="of the server's metrics")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write JSON and HTML of each run, and suite.csv"
    )
    parser.add_argument(
        "--retries", type=int, default=1, help="of a run that can't be believed (default: %(default)s)"
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    return guarded("loadtest suite", lambda: _suite(options))


def _suite(options: argparse.Namespace) -> int:
    if options.serve is None:
        return _run_all(options)
    with own_server(options.serve) as server:
        options.url, options.metrics_url = server.url, server.metrics_url
        return _run_all(options)


def _run_all(options: argparse.Namespace) -> int:
    runs = [(name, _run_options(name, given, options)) for name, given in read_suite(options.file)]
    rows = [["run", "requests/s", "p50 ms", "p99 ms", "errors", "verdict"]]
    statuses = []
    _check_runs(runs)
    for name, chosen in runs:
        print(f"== {name}", flush=True)
        result = _run(chosen, options.retries)
        _write(result, name, options.out)
        if result.total.failed:
            print("\n".join(failures(result)))
        for checked in result.conditions:
            print(condition_line(checked))
        for reason in result.validity.reasons:
            print(f"INVALID: {reason}")
        rows.append(_row(name, result))
        statuses.append(run_command.STATUS[result.verdict])
        if INTERRUPTED in result.validity.reasons:
            print(f"\n{table(rows)}")
            raise KeyboardInterrupt
    status = 1 if 1 in statuses else max(statuses)
    print(f"\n{table(rows)}\n\nverdict: {'PASSED' if not status else 'FAILED' if status == 1 else 'INVALID'}")
    return status


def read_suite(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the name and the flags of each run of a file.

    What `[defaults]` says is each run's where it doesn't say it itself.

    Raises:
        SettingsError: the file can't be read, or has no runs.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"suite '{path}': {error}") from error
    runs, defaults = content.get("run", []), content.get("defaults", {})
    if unknown := content.keys() - {"run", "defaults"}:
        raise SettingsError(
            f"suite '{path}': unknown table '{min(unknown)}', expected [defaults] and [[run]]"
        )
    if not (isinstance(runs, list) and runs and all(isinstance(given, dict) for given in runs)):
        raise SettingsError(f"suite '{path}' has no [[run]]")
    named = [({**defaults, **given}, n) for n, given in enumerate(runs)]
    return [(str(given.pop("name", given.get("model", n))), given) for given, n in named]


def _check_runs(runs: Sequence[tuple[str, argparse.Namespace]]) -> None:
    """Find out now what would end the suite in the middle: a name twice, a model that isn't there."""
    names = [name for name, _ in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"two runs are called '{twice}': give them a name each")
    for _, chosen in runs:
        with Questions(target_of(chosen)) as questions:
            if chosen.wait:
                questions.wait_until_ready(chosen.wait)
            for spec in specs_of(chosen):
                load_of(questions, spec)


def _run_options(name: str, given: dict[str, Any], options: argparse.Namespace) -> argparse.Namespace:
    """A run's flags from its table and the suite's own for the server.

    Raises:
        SettingsError: a key is no flag, or its value none for it.
    """
    words: list[str] = []
    for key, value in given.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{key.replace('_', '-')}={item}"] if not isinstance(item, bool) else []
    try:
        chosen = run_command.parse(words)
    except SystemExit as error:
        raise SettingsError(f"suite '{options.file}', run '{name}': see above") from error
    for flag in (*_SERVER_FLAGS, "ssl", "header", "metrics_url", "quiet"):
        setattr(chosen, flag, getattr(options, flag))
    settings_of(chosen)  # a wrong run should not be found after all others
    specs_of(chosen)
    return chosen


def _run(chosen: argparse.Namespace, retries: int) -> RunResult:
    settings = settings_of(chosen)
    with Session(chosen, specs_of(chosen), settings) as session:
        print(session.describe(settings), flush=True)
        while True:
            with session.progress(settings) as setting:
                runner = run_overload if settings.scenario == "overload" else run
                result = runner(setting, settings)
            over = retries <= 0 or INTERRUPTED in result.validity.reasons
            if result.verdict != "invalid" or over:
                return result
            print(f"once more: {result.validity.reasons[0]}", flush=True)
            retries -= 1


def _row(name: str, result: RunResult) -> list[str]:
    total = result.total
    times = (f"{total.latency.percentile(percent):.3f}" for percent in (50.0, 99.0))
    return [name, f"{total.throughput:.1f}", *times, str(total.failed), result.verdict]


def _write(result: RunResult, name: str, folder: Path | None) -> None:
    if folder is None:
        return
    stem = re.sub(r"[^\w.=-]+", "-", name).strip("-") or "run"
    write_result(result, folder / f"{stem}.json")
    write_html(result, folder / f"{stem}.html")
    write_csv(result, folder / "suite.csv")
