"""A search as one page of HTML: latency and goodput by rate, and the rate that was confirmed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadtest.report.html import document
from loadtest.report.page.axis import latencies, linear
from loadtest.report.page.layout import NOTHING, figure, names, section, table
from loadtest.report.page.markup import Markup, element, join
from loadtest.report.page.quantities import exact, milliseconds
from loadtest.report.page.svg import hover, legend, line, plot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from loadtest.report.page.axis import Axis
    from loadtest.search import Found, Probe

_HEIGHT = 200
_HALF_HOVER = 0.01
# Styles of the page's own palette, from the top of the plot down.
_LATENCIES: dict[str, tuple[str, Callable[[Probe], float]]] = {
    "p99.9": ("max", lambda probe: probe.p999),
    "p99": ("p99", lambda probe: probe.p99),
    "p50": ("p50", lambda probe: probe.p50),
}


def write_search_html(content: Mapping[str, Any], found: Found, path: Path) -> None:
    """Write the page.

    Args:
        content: what the search's JSON has.
        found: by the search.
        path: of the page.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    models = ", ".join(content["models"])
    title = f"{models}: {found.rate:.4g} requests/s with {' and '.join(content['targets'])}"
    sections = [
        _headline(content, found, models),
        section("By rate", _latency(found.curve), _goodput(found.curve)),
        section("Runs", _runs(found.probes)),
        section("Environment", _environment(content)),
    ]
    path.write_text(document(title, sections), encoding="utf-8")


def _headline(content: Mapping[str, Any], found: Found, models: str) -> Markup:
    targets = " and ".join(content["targets"])
    says = (
        f"{found.rate:.1f} requests per second keep {targets}, confirmed {found.confirmations} times"
        if found.rate
        else f"no rate keeps {targets}"
    )
    target = content["target"]
    server = f"{target.get('server', '')} {target.get('version', '')} at {target.get('url', '')}".strip()
    return element(
        "header", element("p", "Search for the highest rate", class_="eyebrow"), element("h1", models),
        element("p", says, class_="load"), element("p", server, class_="server"),
    )  # fmt: skip


def _latency(curve: Sequence[Probe]) -> Markup:
    seen = [probe for probe in curve if probe.p50]
    if not seen:
        return NOTHING
    x = linear(seen[-1].rate, "requests per second")
    values = [value(probe) for probe in seen for _, value in _LATENCIES.values()]
    y = latencies(values, sorted(probe.p50 for probe in seen)[len(seen) // 2], "ms", _HEIGHT)
    marks = [
        line(x, y, [(probe.rate, value(probe)) for probe in seen], style, _HEIGHT)
        for style, value in _LATENCIES.values()
    ]
    keys = [(name, "line", style) for name, (style, _) in reversed(_LATENCIES.items())]
    drawn = plot(x, y, [*marks, *_hovers(x, seen)], label="Latency by rate", height=_HEIGHT)
    return figure("Latency from the schedule, ms", drawn, legend(keys))


def _goodput(curve: Sequence[Probe]) -> Markup:
    if not curve:
        return NOTHING
    x = linear(curve[-1].rate, "requests per second")
    y = linear(max(probe.throughput for probe in curve), "answers/s")
    marks = [
        line(x, y, [(probe.rate, probe.throughput) for probe in curve], "p99", _HEIGHT),
        line(x, y, [(probe.rate, probe.goodput) for probe in curve], "p50", _HEIGHT),
    ]
    keys = [("within the target's latency", "line", "p50"), ("all", "line", "p99")]
    drawn = plot(x, y, [*marks, *_hovers(x, curve)], label="Answers by rate", height=_HEIGHT)
    return figure("Answers per second", drawn, legend(keys))


def _hovers(x: Axis, probes: Sequence[Probe]) -> list[Markup]:
    places = [(x.at(probe.rate), probe) for probe in probes]
    return [hover((at - _HALF_HOVER, at + _HALF_HOVER), _said(probe), _HEIGHT) for at, probe in places]


def _said(probe: Probe) -> str:
    return (
        f"{probe.rate:.1f} requests/s: {probe.why or 'kept'}\np50 {milliseconds(probe.p50)}\n"
        f"p99 {milliseconds(probe.p99)}\np99.9 {milliseconds(probe.p999)}"
    )


def _runs(probes: Sequence[Probe]) -> Markup:
    header = ["run", "requests/s", "answers/s", "goodput/s", "p50, ms", "p99, ms", "p99.9, ms", ""]
    rows = [
        [str(n), *(f"{rate:.1f}" for rate in (p.rate, p.throughput, p.goodput)),
         *(exact(time) for time in (p.p50, p.p99, p.p999)), _outcome(p)]
        for n, p in enumerate(probes, 1)
    ]  # fmt: skip
    return table(header, rows)


def _outcome(probe: Probe) -> str:
    return "kept" if probe.kept else "generator" if probe.generator_limited else "missed"


def _environment(content: Mapping[str, Any]) -> Markup:
    facts = {
        "seed": str(content["seed"]),
        **{f"client's {name}": value for name, value in content["machine"].items()},
        "client's versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    }
    return join([names(facts)])
