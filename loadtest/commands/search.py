"""`python -m loadtest search`: the highest rate at which a server keeps a target, and the curve up to it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.commands.session import CommandError, Session, guarded
from loadtest.conditions import time_of
from loadtest.early_stopping import samples_needed
from loadtest.flags import add_load_flags, add_model_flags, conditions_of, settings_of, specs_of
from loadtest.machine import describe_machine, describe_versions
from loadtest.report.search_html import write_search_html
from loadtest.report.terminal import table
from loadtest.run import check, describe_target, run
from loadtest.search import Found, Probe, Search
from loadtest.settings import SettingsError
from loadtest.target import add_target_flags
from loadtest.validity import INTERRUPTED

if TYPE_CHECKING:
    from loadtest.result import RunResult
    from loadtest.settings import LoadSettings

_LONGEST_PROBE = 60.0
_FIRST_LOOK = 1.0  # seconds of a closed loop, for a rate to begin with
_LIMITS = {
    "server": "a higher rate misses the target",
    "generator": "a higher rate is more than this load generator can send: --processes, or another machine",
    "bound": "--most was reached",
}


def main(arguments: list[str]) -> int:
    """Search; the exit status."""
    options = parse(arguments)
    return guarded("loadtest search", lambda: _search(options))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags of a search."""
    parser = argparse.ArgumentParser(prog="python -m loadtest search", description=__doc__)
    parser.add_argument(
        "--target", action="append", required=True, metavar="CONDITION",
        help="what must hold: 'p99<20ms', 'errors<=0.1%%', ...; without one about errors: none",
    )  # fmt: skip
    parser.add_argument("--start", type=float, help="first rate (default: a quarter of a closed loop's)")
    parser.add_argument("--most", type=float, default=1e6, help="highest rate to try (default: %(default)g)")
    parser.add_argument("--precision", type=float, default=0.01, help="of the rate (default: %(default)g)")
    parser.add_argument("--confirmations", type=int, default=3, help="runs that confirm (default: 3)")
    add_model_flags(parser)
    add_load_flags(parser)
    add_target_flags(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curve")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curve")
    parser.add_argument("--metrics-url", default="", help=argparse.SUPPRESS)
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")
    parser.set_defaults(fail_on=[], duration=5.0, rate="1", scenario="server")
    return parser.parse_args(arguments)


def _search(options: argparse.Namespace) -> int:
    targets = options.target
    if not any(text.strip().startswith("errors") for text in targets):
        targets = [*targets, "errors<=0"]
    settings = replace(settings_of(options), fail_on=conditions_of(targets))
    if not 0 < options.precision < 1 or options.confirmations < 1 or options.most <= 0:
        raise SettingsError("--precision is between 0 and 1, --confirmations and --most above 0")
    with Session(options, specs_of(options), settings) as session:
        prober = _Prober(session, settings)
        start = options.start or prober.first_rate()
        print(f"the highest rate with {' and '.join(targets)}, runs of {settings.duration:g} s or longer")
        found = Search(prober.probe, options.precision, options.confirmations).run(start, options.most)
        target = describe_target(session.setting.questions)
    print(summary(found, targets))
    _write(options, found, targets, target)
    sys.stdout.flush()
    return 0 if found.rate else 1


class _Prober:
    """Runs at one rate after the other."""

    def __init__(self, session: Session, settings: LoadSettings) -> None:
        self._session = session
        self._settings = settings
        percents = [
            float(time[1][1:])
            for condition in settings.fail_on
            if (time := time_of(condition.metric)) and time[1].startswith("p") and time[1] != "p100"
        ]
        self._least = max((samples_needed(percent) for percent in percents if percent < 100), default=100)  # noqa: PLR2004

    def first_rate(self) -> float:
        """A quarter of what one user after the other gets."""
        closed = replace(
            self._settings, scenario="closed", rates=(), users=1, duration=_FIRST_LOOK, fail_on=()
        )
        return max(1.0, run(self._session.setting, closed).total.throughput / 4)

    def probe(self, rate: float, seed: int) -> Probe:
        """One run, long enough for its percentile to mean something."""
        seconds = min(max(self._settings.duration, self._least / rate), _LONGEST_PROBE)
        settings = replace(self._settings, rates=(rate,), duration=seconds)
        with self._session.progress(settings) as setting:
            result = run(setting, settings, seed)
        if INTERRUPTED in result.validity.reasons:
            raise KeyboardInterrupt
        probe = _judged(result, settings, rate)
        times = f"p50 {probe.p50:.3f} ms  p99 {probe.p99:.3f} ms"
        print(f"{rate:10.1f}/s  {times}  {probe.why or 'kept'}", flush=True)
        return probe


def _judged(result: RunResult, settings: LoadSettings, rate: float) -> Probe:
    total, validity = result.total, result.validity
    missed = [
        f"{checked.text}: {checked.value:.4g}"
        for checked in check(settings, total, result.per_model, result.extras)
        if not checked.failed  # a target is what must hold, `check` asks what must not
    ]
    if validity.achieved < 0.99:  # noqa: PLR2004 - the rule of validity
        missed.append(f"achieved {validity.achieved:.1%} of the rate")
    limited, latency = validity.generator_limited, total.latency
    return Probe(
        rate, not missed and not limited, limited, "; ".join(validity.reasons[:1] if limited else missed),
        total.throughput, total.goodput(settings.limit_ms),
        *(latency.percentile(p) for p in (50.0, 99.0, 99.9)),
    )  # fmt: skip


def summary(found: Found, targets: list[str]) -> str:
    """The curve and the rate."""
    header = ["requests/s", "answers/s", "goodput/s", "p50 ms", "p99 ms", "p99.9 ms", ""]
    rows = [
        [*(f"{rate:.1f}" for rate in (p.rate, p.throughput, p.goodput)),
         *(f"{time:.3f}" for time in (p.p50, p.p99, p.p999)), "kept" if p.kept else "missed"]
        for p in found.curve
    ]  # fmt: skip
    text = f"{table([header, *rows])}\n\n" if rows else ""
    if not found.rate:
        return f"{text}no rate keeps {' and '.join(targets)}: {_LIMITS[found.limit]}"
    return (
        f"{text}{found.rate:.1f} requests/s keep {' and '.join(targets)}, "
        f"confirmed {found.confirmations} times; {_LIMITS[found.limit]}"
    )


def _write(options: argparse.Namespace, found: Found, targets: list[str], target: dict[str, str]) -> None:
    content = {
        "format": 1, "targets": targets, "target": target, "models": options.model, "seed": options.seed,
        "machine": describe_machine(), "versions": describe_versions(), **found.as_json(),
    }  # fmt: skip
    try:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1) + "\n")
            print(f"written: {options.json}")
        if options.html:
            write_search_html(content, found, options.html)
            print(f"written: {options.html}")
    except OSError as error:
        raise CommandError(f"the report: {error}") from error
