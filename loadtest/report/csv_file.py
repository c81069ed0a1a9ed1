"""A result as CSV: a line for all models and one for each, in the same columns whatever the run."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

from loadtest.latency import PERCENTILES

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.figures import Figures
    from loadtest.result import RunResult

TIMES = ("latency", "service", "lag")
STATISTICS = ("mean", *(f"p{percent:g}" for percent in PERCENTILES), "max")
_COUNTS = ("offered", "answered", "failed", "seconds", "throughput")
_COLUMNS = (
    "started", "scenario", "load", "model", "offered", "answered", "failed", "seconds", "throughput",
    *(f"{time}_{statistic}_ms" for time in TIMES for statistic in STATISTICS),
    "tokens", "tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms",
    "valid", "verdict",
)  # fmt: skip


def write_csv(result: RunResult, path: Path) -> None:
    """Append the result's lines to a file, which begins with the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        if new:
            writer.writeheader()
        for name, figures in {"": result.total, **result.per_model}.items():
            writer.writerow(_row(result, name, figures))


def _row(result: RunResult, model: str, figures: Figures) -> dict[str, Any]:
    row: dict[str, Any] = {
        "started": result.started, "scenario": result.scenario, "load": result.load,
        "model": model or "(all)", "valid": result.validity.valid, "verdict": result.verdict,
        **{name: getattr(figures, name) for name in _COUNTS},
    }  # fmt: skip
    for time in TIMES:
        histogram = getattr(figures, time)
        row |= {f"{time}_mean_ms": histogram.mean, f"{time}_max_ms": histogram.max}
        row |= {f"{time}_p{percent}_ms": value for percent, value in histogram.percentiles().items()}
    if figures.stream:
        row |= {"tokens": figures.stream.tokens, "tokens_per_second": figures.stream.tokens_per_second}
        for prefix, histogram in (("ttft", figures.stream.first_token), ("itl", figures.stream.inter_token)):
            row |= {f"{prefix}_p{p:g}_ms": histogram.percentile(p) for p in (50.0, 99.0)}
    return row
