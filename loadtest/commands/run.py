"""`python -m loadtest`: one run, its report, its verdict."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import loadtest.__main__ as program
from loadtest.commands.session import CommandError, Session, guarded
from loadtest.flags import add_load_flags, add_model_flags, add_report_flags, settings_of, specs_of
from loadtest.overload import run_overload
from loadtest.report.terminal import report
from loadtest.report.write import write_reports
from loadtest.run import run
from loadtest.target import add_target_flags

if TYPE_CHECKING:
    from loadtest.result import RunResult

STATUS = {"passed": 0, "failed": 1, "invalid": 3}


def main(arguments: list[str]) -> int:
    """Run it; the exit status."""
    options = parse(arguments)
    return guarded("loadtest", lambda: _run(options))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=program.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_flags(parser)
    add_load_flags(parser)
    add_target_flags(parser)
    add_report_flags(parser)
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    settings, specs = settings_of(options), specs_of(options)
    with ExitStack() as stack:
        session = stack.enter_context(Session(options, specs, settings))
        print(session.describe(settings), flush=True)
        with session.progress(settings) as setting:
            result = (
                run_overload(setting, settings) if settings.scenario == "overload" else run(setting, settings)
            )
    return finish(result, options)


def finish(result: RunResult, options: argparse.Namespace) -> int:
    """Print and write a result; the exit status.

    Raises:
        CommandError: a file can't be written.
    """
    print(report(result))
    try:
        write_reports(result, options)
    except OSError as error:
        raise CommandError(f"the report: {error}") from error
    sys.stdout.flush()
    # Who asks for no verdict is told in the report that the figures can't be believed.
    return STATUS[result.verdict] if result.conditions or result.verdict == "failed" else 0
