"""`python -m loadtest compare`: two results side by side, with intervals that say what is chance."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.commands.session import CommandError, guarded
from loadtest.comparison import Change, compare
from loadtest.report.terminal import table
from loadtest.result import read_result
from loadtest.settings import SettingsError

if TYPE_CHECKING:
    from loadtest.result import RunResult

_LIMIT = re.compile(r"([a-z0-9.]+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*%")


def main(arguments: list[str]) -> int:
    """Compare them; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest compare", description=__doc__)
    parser.add_argument("before", type=Path, help="of a run with --json")
    parser.add_argument("after", type=Path, help="of another")
    parser.add_argument(
        "--fail-on", action="append", default=[], metavar="CHANGE",
        help="exit with 1 if a figure has certainly changed by more: 'p99>+10%%', 'throughput<-5%%'",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return guarded("loadtest compare", lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    limits = [_limit(text) for text in options.fail_on]
    before, after = read_result(options.before), read_result(options.after)
    changes = {change.metric: change for change in compare(before, after)}
    if not changes:
        raise CommandError("one of the runs has no answers, so there is nothing to compare")
    header = ["", "before", "after", "change", "95 % interval", ""]
    print(table([header, *(_row(change) for change in changes.values())]))
    for name, result in (("before", before), ("after", after)):
        for reason in result.validity.reasons:
            print(f"INVALID, {name}: {reason}")
    for name, result in (("before", before), ("after", after)):
        if result.total.failed:
            print(f"ERRORS, {name}: {result.total.failed} of {result.total.offered}; the rest is compared")
    for note in _differences(before, after):
        print(f"note: {note}")
    failed = [_failed(changes, *limit) for limit in limits]
    if limits and not (before.validity.valid and after.validity.valid):
        print("verdict: INVALID")
        return 3
    return 1 if any(failed) else 0


def _row(change: Change) -> list[str]:
    unit = "/s" if change.metric == "throughput" else " ms"
    interval = f"{change.low:+.1%} to {change.high:+.1%}"
    figures = [f"{value:.3f}{unit}" for value in (change.before, change.after)]
    return [change.metric, *figures, f"{change.change:+.1%}", interval, change.verdict]


def _limit(text: str) -> tuple[str, str, float]:
    found = _LIMIT.fullmatch(text.strip())
    if not found:
        raise SettingsError(
            f"--fail-on is '{text}', expected a change such as 'p99>+10%' or 'throughput<-5%'"
        )
    return found[1], found[2], float(found[3]) / 100


def _failed(changes: dict[str, Change], metric: str, sign: str, limit: float) -> bool:
    if metric not in changes:
        raise SettingsError(f"--fail-on names '{metric}', there is only {', '.join(changes)}")
    change = changes[metric]
    failed = change.low > limit if sign == ">" else change.high < limit
    word = "FAILED" if failed else "ok"
    print(f"{word:<6} {metric} {sign} {limit:+.1%}: {change.low:+.1%} to {change.high:+.1%}")
    return failed


def _differences(before: RunResult, after: RunResult) -> list[str]:
    """What else was not the same in the two runs."""
    pairs = {
        "load": (before.load, after.load),
        "seed": (before.seed, after.seed),
        "machine": (before.machine, after.machine),
        "models": ([m["name"] for m in before.models], [m["name"] for m in after.models]),
    }
    return [f"{name} was {a}, then {b}" for name, (a, b) in pairs.items() if a != b]
