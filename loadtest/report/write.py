"""A result into the files that a command line names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.report.csv_file import write_csv
from loadtest.report.html import write_html
from loadtest.result import write_result

if TYPE_CHECKING:
    import argparse

    from loadtest.result import RunResult


def write_reports(result: RunResult, options: argparse.Namespace) -> None:
    """Write what `--json`, `--csv` and `--html` ask for, and say where it is.

    Raises:
        OSError: a file can't be written.
    """
    for path, write in ((options.json, write_result), (options.csv, write_csv), (options.html, write_html)):
        if path:
            write(result, path)
            print(f"written: {path}")
