"""The tables at the page's end: what the plots show in numbers, and what it takes to run it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.early_stopping import samples_needed
from loadtest.latency import PERCENTILES
from loadtest.report.page.layout import NOTHING, details, names, table
from loadtest.report.page.markup import Markup, element, join
from loadtest.report.page.quantities import exact, grouped, percent
from loadtest.report.page.server_share import bar_of

if TYPE_CHECKING:
    from loadtest.figures import Figures
    from loadtest.latency import Histogram
    from loadtest.result import RunResult


def percentile_table(result: RunResult) -> Markup:
    """The distribution of each time; of the latency how sure it is."""
    total = result.total
    if not total.answered:
        return NOTHING
    times = {"latency": total.latency}
    if result.load.startswith("open"):
        times |= {"service time": total.service, "lag": total.lag}
    header = ["ms", *times, "latency at most, 99 % sure"]
    rows = [["min", *(f"{h.min:.3f}" for h in times.values()), ""]]
    rows += [
        [f"p{p:g}", *(f"{h.percentile(p):.3f}" for h in times.values()), _bound(result, p)]
        for p in PERCENTILES
    ]
    rows += [
        ["max", *(f"{h.max:.3f}" for h in times.values()), ""],
        ["mean", *(f"{h.mean:.3f}" for h in times.values()), ""],
        ["values", *(grouped(h.count) for h in times.values()), ""],
    ]
    return table(header, rows)


def _bound(result: RunResult, percentile: float) -> Markup:
    key = f"{percentile:g}"
    if key not in result.bounds:
        return NOTHING
    bound = result.bounds[key]
    if bound is not None:
        return element("span", f"{bound:.3f}")
    needed = grouped(samples_needed(percentile))
    return element("span", f"too few requests: {needed} needed", class_="faint")


def model_table(result: RunResult) -> Markup:
    """A line for each model, if there are several."""
    if len(result.per_model) < 2:  # noqa: PLR2004 - of one model it is the total
        return NOTHING
    header = [
        "model", "answered", "failed", "requests/s", "p50, ms", "p90, ms", "p99, ms", "p99.9, ms", "max, ms"
    ]  # fmt: skip
    return table(header, [_model_row(name, figures) for name, figures in result.per_model.items()])


def _model_row(name: str, figures: Figures) -> list[str]:
    return [
        name, grouped(figures.answered), grouped(figures.failed), grouped(figures.throughput, 1),
        *(_time(figures.latency, p) for p in (50.0, 90.0, 99.0, 99.9, 100.0)),
    ]  # fmt: skip


def _time(histogram: Histogram, percentile: float) -> str:
    return f"{histogram.percentile(percentile):.3f}" if histogram.count else "–"


def stream_table(result: RunResult) -> Markup:
    """The tokens of each model that streams."""
    header = [
        "model", "tokens", "tokens/s", "first token p50, ms", "p90, ms", "p99, ms", "inter-token p50, ms",
        "p90, ms", "p99, ms",
    ]  # fmt: skip
    rows = [
        [name, grouped(stream.tokens), grouped(stream.tokens_per_second, 1),
         *(_time(h, p) for h in (stream.first_token, stream.inter_token) for p in (50.0, 90.0, 99.0))]
        for name, figures in result.per_model.items() if (stream := figures.stream)
    ]  # fmt: skip
    return table(header, rows)


def error_table(result: RunResult) -> Markup:
    """What went wrong how often, and what the server said with the first of each."""
    failures, offered = result.total.failures, max(1, result.total.offered)
    most = max(failures.values(), default=1)
    rows = [
        [element("code", status),
         join([grouped(count), bar_of(count / most, "failed")]),
         percent(count / offered), " ".join(result.messages.get(status, "").split())]
        for status, count in failures.most_common()
    ]  # fmt: skip
    return table(["status", "count", "of requests", "the first one's message"], rows, "texts errors")


def metrics_table(result: RunResult) -> Markup:
    """The server's metrics that are not what they were before, behind a click."""
    rows = [
        [element("code", series), *(exact(value) for value in (before, after, after - before))]
        for series, (before, after) in result.server.metrics.items()
    ]
    return details(
        f"{len(rows)} of the server's metrics moved", table(["series", "before", "after", "change"], rows)
    )


def models_table(result: RunResult) -> Markup:
    """What was asked of which model."""
    weights = sum(float(model.get("weight", 1)) for model in result.models) or 1.0
    rows = [
        [str(model["name"]), str(model.get("version", "")),
         percent(float(model.get("weight", 1)) / weights, 0),
         str(model.get("batch_size", "")), grouped(float(model.get("request_bytes", 0))),
         "a stream" if model.get("streams") else "one answer"]
        for model in result.models
    ]  # fmt: skip
    header = ["model", "version", "share of requests", "rows a request", "bytes a request", "answers"]
    return table(header, rows)


def environment(result: RunResult) -> Markup:
    """What the figures depend on, and how to get them again."""
    target = result.target
    facts = {
        "started": result.started, "scenario": result.scenario, "load": result.load, "seed": str(result.seed),
        "server": f"{target.get('server', '')} {target.get('version', '')}".strip(),
        "url": target.get("url", ""), "TLS": target.get("tls", ""),
        **{f"client's {name}": value for name, value in result.machine.items()},
        "client's versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }  # fmt: skip
    command = element("code", " ".join(["python -m loadtest", *result.command]))
    return join([names(facts), element("p", "again with", class_="again"), element("pre", command)])
