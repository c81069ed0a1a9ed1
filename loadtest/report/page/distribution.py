"""Percentile curves: how long which share of the requests took, in steps, so that each sample can be seen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from loadtest.report.page.axis import BEYOND, Axis, latencies, percentiles
from loadtest.report.page.layout import NOTHING, figure, side_by_side
from loadtest.report.page.quantities import counted, milliseconds
from loadtest.report.page.svg import hover, legend, line, plot, whisker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loadtest.figures import Figures
    from loadtest.latency import Histogram
    from loadtest.report.page.markup import Markup
    from loadtest.result import RunResult

    Series = tuple[str, str, Histogram]  # name, style, values

_POINTS, _BANDS, _HEIGHT = 400, 48, 260
_BELOW = 10
_X_TITLE = "percentile; each nine takes as much room as the one before"
# As many as there are colours that can be told apart.
_MOST_SERIES = 6


def percentile_curve(result: RunResult) -> Markup:
    """The curve of all requests; in an open loop what the load generator has to do with it, too."""
    total = result.total
    if not total.answered:
        return NOTHING
    series = [("latency, from the schedule", "latency", total.latency)]
    if result.load.startswith("open"):
        series += [
            ("service time, from the sending", "service", total.service),
            ("lag, sent late by", "lag", total.lag),
        ]
    else:
        series = [("latency", "latency", total.latency)]
    return _curves("Latency by percentile, ms", [one for one in series if one[2].count], result.bounds)


def model_curves(per_model: Mapping[str, Figures]) -> Markup:
    """The latency of each of several models that answered."""
    found = [(name, figures.latency) for name, figures in per_model.items() if figures.answered]
    return _by_model("Latency of each model, ms", found) if len(found) > 1 else NOTHING


def stream_curves(per_model: Mapping[str, Figures]) -> Markup:
    """Of streams: the time to the first token, and from one to the next, a line for each model."""
    streams = {name: figures.stream for name, figures in per_model.items() if figures.stream}
    first = [(name, stream.first_token) for name, stream in streams.items()]
    inter = [(name, stream.inter_token) for name, stream in streams.items()]
    return side_by_side(
        _by_model(title, found)
        for title, found in (("Time to first token, ms", first), ("Inter-token latency, ms", inter))
    )


def _by_model(title: str, found: Sequence[tuple[str, Histogram]]) -> Markup:
    kept = [(name, values) for name, values in found if values.count]
    if not kept:
        return NOTHING
    series = [(name, f"series{n}", values) for n, (name, values) in enumerate(kept[:_MOST_SERIES])]
    left = len(kept) - len(series)
    return _curves(title, series, {}, f"And {counted(left, 'model')} more, see the table." if left else "")


def curve(histogram: Histogram, x: Axis) -> list[tuple[float, float]]:
    """Points (share, milliseconds) at places evenly spread over the axis, up to the largest value."""
    values, counts = histogram.counts()
    cumulated, total = np.cumsum(counts), histogram.count
    nines = np.linspace(0, min(-math.log10(1 - x.high), math.log10(total) + BEYOND), _POINTS)
    shares = 1 - 10**-nines
    # Which of the sorted values is the percentile: HdrHistogram's rule, so that curve and table agree.
    ranks = np.maximum(1, np.floor(shares * total + 0.5))
    found = values[np.searchsorted(cumulated, np.minimum(ranks, total))]
    return list(zip(shares.tolist(), found.tolist(), strict=True))


def _curves(
    title: str, series: Sequence[Series], bounds: Mapping[str, float | None], note: str = ""
) -> Markup:
    sure = {float(percent): bound for percent, bound in bounds.items() if bound is not None}
    x = percentiles(max(values.count for _, _, values in series), _X_TITLE)
    _, style, first = series[0]
    # The generator's own lag may be far below; where it is, doesn't matter.
    least = first.percentile(1) / _BELOW
    ends = [end for _, _, values in series for end in (max(least, values.percentile(1)), values.max)]
    y = latencies([*ends, *sure.values()], first.percentile(50), title, _HEIGHT)
    whiskers = [
        whisker(x.at(percent / 100), y.at(first.percentile(percent)), y.at(bound), style, _HEIGHT)
        for percent, bound in sure.items()
    ]
    lines = [
        line(x, y, [p if p[1] >= y.low else None for p in curve(values, x)], style, _HEIGHT)
        for _, style, values in reversed(series)
    ]
    keys = [(name, "line", style) for name, style, _ in series]
    if sure:
        keys.append(("the true percentile is below, with 99 % confidence", "whisker", style))
    drawn = plot(
        x, y, [*lines, *whiskers, *_bands(x, series, sure)], label=f"{title}, by percentile", height=_HEIGHT
    )
    return figure(title, drawn, legend(keys), note)


def _bands(x: Axis, series: Sequence[Series], sure: Mapping[float, float]) -> list[Markup]:
    """What the curves say at a percentile; a band that holds one of the usual percentiles says that one's."""
    nines = -math.log10(1 - x.high)
    found = []
    for n in range(_BANDS):
        low, high = n / _BANDS, (n + 1) / _BANDS
        usual = [percent for percent in (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 99.999)
                 if low <= x.at(percent / 100) < high and percent / 100 <= x.high]  # fmt: skip
        middle = (low + high) / 2 * nines
        percent = usual[0] if usual else round(100 * (1 - 10**-middle), max(1, math.ceil(middle)))
        texts = [
            f"p{percent:.10g}",
            *(f"{name}: {milliseconds(h.percentile(percent))}" for name, _, h in series),
        ]
        if percent in sure:
            texts.append(f"at most {milliseconds(sure[percent])} with 99 % confidence")
        found.append(hover((low, high), "\n".join(texts), _HEIGHT))
    return found
