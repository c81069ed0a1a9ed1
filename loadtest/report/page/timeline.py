"""The run over time: rates, latencies, and how many requests were under way, in slices of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.report.page.axis import Axis, latencies, linear, seconds, whole
from loadtest.report.page.layout import NOTHING, figure
from loadtest.report.page.markup import join
from loadtest.report.page.quantities import grouped, milliseconds
from loadtest.report.page.svg import column, hover, legend, line, plot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.figures import Slice
    from loadtest.report.page.markup import Markup
    from loadtest.result import RunResult

_X_TITLE = "seconds from the start"
_LOW, _TALL = 100, 180
_LATENCIES: dict[str, Callable[[Slice], float]] = {
    "max": lambda part: part.latency.max,
    "p99": lambda part: part.latency.percentile(99),
    "p50": lambda part: part.latency.percentile(50),
}


def timeline(result: RunResult) -> Markup:
    """Three plots above each other, over the same seconds."""
    slices = result.slices
    if not any(part.offered for part in slices):
        return NOTHING
    end = slices[-1].start + slices[-1].seconds
    return join([_rates(slices, end), _latency(slices, end), _under_way(slices, end)])


def _rates(slices: Sequence[Slice], end: float) -> Markup:
    x = seconds(end, "")
    y = linear(max(part.offered / part.seconds for part in slices), "requests/s")
    marks, keys = [], [("answered", "area", "answered")]
    for part in slices:
        answered, offered = (y.at(count / part.seconds) for count in (part.answered, part.offered))
        marks.append(column(_span(x, part), (0, answered), "answered", _TALL))
        if part.failed:
            marks.append(column(_span(x, part), (answered, offered), "failed", _TALL))
    if any(part.failed for part in slices):
        keys.append(("failed", "area", "failed"))
    drawn = plot(
        x, y, [*marks, *_hovers(x, slices, _TALL)], label="Requests per second over time", height=_TALL
    )  # fmt: skip
    return figure("Requests per second", drawn, legend(keys))


def _latency(slices: Sequence[Slice], end: float) -> Markup:
    answered = [part for part in slices if part.answered]
    if not answered:
        return NOTHING
    x = seconds(end, "")
    values = [value(part) for part in answered for value in _LATENCIES.values()]
    typical = sorted(part.latency.percentile(50) for part in answered)[len(answered) // 2]
    y = latencies(values, typical, "ms", _TALL)
    marks = [
        line(x, y, [(s.start + s.seconds / 2, value(s)) if s.answered else None for s in slices], name, _TALL)
        for name, value in _LATENCIES.items()
    ]
    failing = [column(_span(x, s), (0.98, 1.0), "failed", _TALL) for s in slices if s.failed]
    keys = [(name, "line", name) for name in reversed(_LATENCIES)]
    if failing:
        keys.append(("some failed", "area", "failed"))
    drawn = plot(
        x, y, [*marks, *failing, *_hovers(x, slices, _TALL)], label="Latency over time", height=_TALL
    )  # fmt: skip
    return figure("Latency, ms", drawn, legend(keys))


def _under_way(slices: Sequence[Slice], end: float) -> Markup:
    x = seconds(end, _X_TITLE)
    y = whole(max(part.under_way for part in slices), "requests")
    points = [(0.0, 0.0), *((s.start + s.seconds, float(s.under_way)) for s in slices)]
    marks = [line(x, y, points, "under-way", _LOW), *_hovers(x, slices, _LOW)]
    note = (
        f"In {len(slices)} slices of {slices[0].seconds:.4g} s. A request counts, whatever became of "
        "it, in the slice in which it was due; under way are those without an answer at a slice's end."
    )
    drawn = plot(x, y, marks, label="Requests under way over time", height=_LOW)
    return figure("Requests under way", drawn, note=note)


def _span(x: Axis, part: Slice) -> tuple[float, float]:
    """Where a slice lies, short of a gap to the next."""
    return x.at(part.start + 0.06 * part.seconds), x.at(part.start + 0.94 * part.seconds)


def _hovers(x: Axis, slices: Sequence[Slice], height: int) -> list[Markup]:
    return [hover((x.at(s.start), x.at(s.start + s.seconds)), _said(s), height) for s in slices]


def _said(part: Slice) -> str:
    lines = [
        f"{part.start:.4g} to {part.start + part.seconds:.4g} s",
        f"offered {part.offered / part.seconds:.1f}/s, answered {part.answered / part.seconds:.1f}/s",
    ]
    if part.failed:
        lines.append(f"failed: {grouped(part.failed)}")
    if part.answered:
        lines += [f"{name}: {milliseconds(value(part))}" for name, value in reversed(_LATENCIES.items())]
    return "\n".join([*lines, f"under way at its end: {grouped(part.under_way)}"])
