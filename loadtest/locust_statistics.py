"""locust's statistics in fractions of a millisecond, and complete.

locust counts response times below 100 ms by the whole millisecond, and prints and writes whole ones: a
service of 0.33 ms has a p50 of 0. `keep_fractions` replaces the rounding, for which locust has a hook, and
the places that would cut the fraction off again, for which it has none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from locust import stats

if TYPE_CHECKING:
    from locust.env import Environment

_DIGITS = 3
_P999 = 0.999
_whole_to_dict = stats.StatsEntry.to_dict
_close_files = stats.StatsCSVFileWriter.close_files


def keep_fractions() -> None:
    """Have locust keep and show fractions, and the 99.9th percentile on its web page, too.

    It must run in every process, the master's as well, before a test starts.
    """
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (stats, "bucket_response_time", bucket),
        (stats.StatsEntry, "to_string", _line),
        (stats.StatsEntry, "percentile", _percentile_line),
        (stats.StatsEntry, "to_dict", _to_dict),
        (stats.StatsCSV, "_percentile_fields", _percentile_fields),
        (stats.StatsCSVFileWriter, "close_files", _complete_files),
    )
    for owner, name, ours in replaced:
        assert hasattr(owner, name), f"this locust has no {name}"
        setattr(owner, name, ours)
    for percentiles in (stats.PERCENTILES_TO_REPORT, stats.PERCENTILES_TO_STATISTICS):
        if _P999 not in percentiles:
            percentiles.append(_P999)
            percentiles.sort()


def count_from_first_request(environment: Environment) -> None:
    """Have a master's rates count from when its workers were ready to send.

    They count from when it told them to start, which takes up to a second: a fifth of the rate of 5 s.
    """
    began = 0.0

    def new_test(**_others: object) -> None:
        nonlocal began
        began = 0.0

    def take_start(data: dict[str, Any], **_others: object) -> None:
        nonlocal began
        reported = data["stats_total"]
        if reported["num_requests"]:
            began = min(began, reported["start_time"]) if began else reported["start_time"]
            environment.stats.total.start_time = began

    events: Any = environment.events  # whose methods are not annotated
    events.test_start.add_listener(new_test)
    events.worker_report.add_listener(take_start)


def bucket(milliseconds: float) -> float:
    """A response time to three digits, or to the microsecond: how exactly they are counted."""
    if milliseconds < 1:
        return round(milliseconds, _DIGITS)
    return round(milliseconds, _DIGITS - 1 - int(math.log10(milliseconds)))


def text(milliseconds: float) -> str:
    """A time to three digits, in at most six characters up to a quarter of an hour."""
    decimals = _DIGITS if milliseconds < 1 else max(0, _DIGITS - 1 - int(math.log10(milliseconds)))
    return f"{milliseconds:.{decimals}f}"


def _line(entry: Any, current: bool = True) -> str:  # noqa: FBT001, FBT002 - locust's signature
    """An entry as a line of the table that is printed while a test runs and after it."""
    times = (
        entry.avg_response_time, entry.min_response_time or 0, entry.max_response_time,
        entry.median_response_time or 0,
    )  # fmt: skip
    average, least, most, median = map(text, times)
    rates = (
        (entry.current_rps, entry.current_fail_per_sec)
        if current
        else (entry.total_rps, entry.total_fail_per_sec)
    )
    failures = f"{entry.num_failures}({entry.fail_ratio:.2%})"
    name_width = stats.STATS_NAME_WIDTH - stats.STATS_TYPE_WIDTH + 4
    return (
        f"{entry.method or '':{stats.STATS_TYPE_WIDTH}} {entry.name:{name_width}} {entry.num_requests:7} "
        f"{failures:>12} |{average:>7} {least:>7} {most:>7}{median:>7} | {rates[0]:7.2f} {rates[1]:11.2f}"
    )


def _percentile_line(entry: Any) -> str:
    """An entry as a line of the table of percentiles."""
    first, *others = (text(entry.get_response_time_percentile(p)) for p in stats.PERCENTILES_TO_REPORT)
    name = f"{entry.method or '':{stats.STATS_TYPE_WIDTH}} {entry.name:{stats.STATS_NAME_WIDTH}}"
    return " ".join([name, f"{first:>8}", *(f"{column:>6}" for column in (*others, entry.num_requests))])


def _percentile_fields(writer: Any, entry: Any, use_current: bool = False) -> list[Any]:  # noqa: FBT001, FBT002 - locust's signature
    """An entry's percentiles in a CSV file."""
    if not entry.num_requests:
        return list(writer.percentiles_na)
    current = use_current and entry.use_response_times_cache
    get = entry.get_current_response_time_percentile if current else entry.get_response_time_percentile
    return [get(percent) or 0 for percent in writer.percentiles_to_report]


def _to_dict(entry: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
    """An entry for the web page and the HTML report."""
    exact = {"min_response_time": entry.min_response_time or 0, "max_response_time": entry.max_response_time}
    rounded = {name: bucket(time) for name, time in exact.items()}
    return {**_whole_to_dict(entry, *arguments, **named), **rounded}


def _complete_files(writer: Any) -> None:
    """The files of --csv with the test's last second: locust writes them once a second, not at the end."""
    for kind in ("requests", "failures", "exceptions"):
        file = getattr(writer, f"{kind}_csv_filehandle")
        file.seek(0)
        getattr(writer, f"{kind}_csv")(getattr(writer, f"{kind}_csv_writer"))
        file.truncate()
    _close_files(writer)
