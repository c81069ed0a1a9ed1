"""`python -m loadtest report`: what a run wrote with `--json`, as text, CSV or a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtest.commands.run import finish
from loadtest.commands.session import guarded
from loadtest.result import read_result


def main(arguments: list[str]) -> int:
    """Report it; the exit status is that of the run."""
    parser = argparse.ArgumentParser(prog="python -m loadtest report", description=__doc__)
    parser.add_argument("result", type=Path, help="of a run with --json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, in one file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a line for each model")
    parser.set_defaults(json=None)
    options = parser.parse_args(arguments)
    return guarded("loadtest report", lambda: finish(read_result(options.result), options))
