"""A result as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.early_stopping import samples_needed
from loadtest.server_side import STAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.figures import Figures
    from loadtest.result import Checked, RunResult

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 99.99)
_LEFT = 18


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def report(result: RunResult) -> str:
    """The whole report, the verdict last."""
    open_loop = result.load.startswith("open")
    blocks = [
        _counts(result),
        _latencies(result.total, open_loop=open_loop),
        _per_model(result),
        _stream(result),
        _server(result),
        "\n".join(f"note: {note}" for note in result.notes),
        _validity(result, open_loop=open_loop),
        verdict(result),
    ]
    return "\n\n".join(block for block in blocks if block)


def _line(name: str, value: str) -> str:
    return f"{name:<{_LEFT}} {value}"


def _counts(result: RunResult) -> str:
    total = result.total
    lines = [
        _line("requests answered", f"{total.answered} of {total.offered}"),
        _line("throughput", f"{total.throughput:.1f} requests/s"),
        *(_times(result) if total.answered else ()),
        *failures(result),
    ]
    lines += [_line(name, f"{value:.4g}") for name, value in result.extras.items()]
    return "\n".join(lines)


def _times(result: RunResult) -> list[str]:
    latency = result.total.latency
    percentiles = (
        _line(f"p{p:g}", f"{latency.percentile(p):.3f} ms{_bound(result, p)}") for p in PERCENTILES
    )
    return [_line("mean", f"{latency.mean:.3f} ms"), *percentiles, _line("max", f"{latency.max:.3f} ms")]


def failures(result: RunResult) -> list[str]:
    """How many requests failed, by status, with what the server said to the first of each."""
    lines = [_line("failed", f"{result.total.failed}")]
    for status, count in result.total.failures.most_common():
        said = " ".join(result.messages.get(status, "").split())
        lines.append(_line(f"  {status}", f"{count}  {said}".rstrip()))
    return lines


def _bound(result: RunResult, percent: float) -> str:
    bound = result.bounds.get(f"{percent:g}")
    if bound is None:
        needed = samples_needed(percent)
        return f"   (too few requests to be sure: {needed} or more)" if result.total.answered else ""
    return f"   (at most {bound:.3f} ms with 99 % confidence)"


def _latencies(total: Figures, *, open_loop: bool) -> str:
    """The three times of a request side by side."""
    if not open_loop or not total.answered:
        return ""
    times = {"from the schedule": total.latency, "from the sending": total.service, "sent late by": total.lag}
    header = ["ms", "mean", *(f"p{p:g}" for p in PERCENTILES), "max"]
    rows = [
        [name, *(f"{v:.3f}" for v in (h.mean, *(h.percentile(p) for p in PERCENTILES), h.max))]
        for name, h in times.items()
    ]
    return table([header, *rows])


def _per_model(result: RunResult) -> str:
    if len(result.per_model) < 2:  # noqa: PLR2004 - of one model it is the total
        return ""
    header = ["model", "answered", "failed", "requests/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms"]
    rows = [
        [name, str(f.answered), str(f.failed), f"{f.throughput:.1f}",
         *(f"{v:.3f}" for v in (*(f.latency.percentile(p) for p in (50.0, 99.0, 99.9)), f.latency.max))]
        for name, f in result.per_model.items()
    ]  # fmt: skip
    return table([header, *rows])


def _stream(result: RunResult) -> str:
    rows = [
        [name, str(f.stream.tokens), f"{f.stream.tokens_per_second:.1f}",
         *(f"{h.percentile(p):.3f}"
           for h in (f.stream.first_token, f.stream.inter_token) for p in (50.0, 99.0))]
        for name, f in result.per_model.items() if f.stream
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["streams", "tokens", "tokens/s", "first token p50 ms", "p99", "inter-token p50 ms", "p99"]
    return table([header, *rows])


def _server(result: RunResult) -> str:
    """What the server itself counted, the mean of a request: what is missing to the client's is transport."""
    models = {name: side for name, side in result.server.models.items() if side.requests}
    if not models:
        return ""
    header = [
        "server, mean ms",
        "requests",
        "failed",
        "total",
        "queue",
        "input",
        "inference",
        "output",
        "rows a run",
    ]
    rows = [
        [name, str(side.requests), str(side.failed),
         *(f"{getattr(side, stage):.3f}" for stage in ("total", *STAGES)),
         f"{side.rows_per_run:.2f}"]
        for name, side in models.items()
    ]  # fmt: skip
    return table([header, *rows])


def _validity(result: RunResult, *, open_loop: bool) -> str:
    validity = result.validity
    figures = f"busiest process {validity.busiest_core:.0%} of a core"
    if open_loop:
        figures = (
            f"lag p99 {validity.lag_p99:.3f} ms, {figures}, achieved {validity.achieved:.1%} of the rate"
        )
    lines = [f"generator: {figures}"]
    lines += [f"INVALID: {reason}" for reason in validity.reasons]
    if not open_loop:
        lines.append(
            "A closed loop slows down with its server, so its tail is too kind: no figure for a release."
        )
    return "\n".join(lines)


def verdict(result: RunResult) -> str:
    """The conditions, and what they come to."""
    lines = [condition_line(checked) for checked in result.conditions]
    if result.conditions:
        lines.append(f"verdict: {result.verdict.upper()}")
    return "\n".join(lines)


def condition_line(checked: Checked) -> str:
    """A condition, the figure that it was asked of, and whether it fails the run."""
    return f"{'FAILED' if checked.failed else 'ok':<6} fail on {checked.text}: {checked.value:.4g}"
