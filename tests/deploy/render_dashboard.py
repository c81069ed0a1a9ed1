"""Draw the Grafana dashboard as a page of HTML from a Prometheus, for a look where no Grafana is to be had.

python tests/deploy/render_dashboard.py http://localhost:9090 dashboard.html

Each panel is where and as large as Grafana puts it, and shows what its own expressions answer over the last
minutes. Colours, legends and tables are not Grafana's.
"""

from __future__ import annotations

import html
import io
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import dates, ticker
from matplotlib.figure import Figure

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "onnxedge.json"
RANGE_SECONDS = 300
STEP_SECONDS = 5
RATE_INTERVAL = "20s"  # four scrapes, as Grafana computes it for this data source
ROW_PIXELS, COLUMN_PIXELS = 34, 62
_STYLE = """
body { background: #111217; color: #ccccdc; font: 13px sans-serif; margin: 8px; position: relative }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c3235; overflow: hidden }
.panel h2 { font-size: 13px; margin: 4px 8px }
.stat { font-size: 34px; text-align: center }
.row { position: absolute; font-weight: bold; padding-top: 10px }
table { margin: 4px 8px }
td, th { padding: 1px 12px 1px 0; text-align: left }
"""


def main() -> None:
    address, target = sys.argv[1:]
    dashboard = json.loads(DASHBOARD.read_text())
    mpl.rcParams.update({"text.color": "#ccccdc", "xtick.color": "#ccccdc", "ytick.color": "#ccccdc"})
    parts = [f"<!doctype html><style>{_STYLE}</style>"]
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        style = (
            f"left:{place['x'] * COLUMN_PIXELS}px;top:{place['y'] * ROW_PIXELS}px;"
            f"width:{place['w'] * COLUMN_PIXELS - 8}px;height:{place['h'] * ROW_PIXELS - 8}px"
        )
        title = html.escape(panel["title"])
        if panel["type"] == "row":
            parts.append(f'<div class="row" style="{style}">{title}</div>')
            continue
        body = draw(panel, [(target, ask(address, target)) for target in panel["targets"]])
        parts.append(f'<div class="panel" style="{style}"><h2>{title}</h2>{body}</div>')
    Path(target).write_text("\n".join(parts))


def ask(address: str, target: dict[str, Any]) -> list[Any]:
    """What an expression answers: series over the range, or one point each."""
    expression = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$model", ".*")
    now = time.time()
    query: dict[str, Any] = {"query": expression, "time": now}
    kind = "query"
    if not target["instant"]:
        kind = "query_range"
        query |= {"start": now - RANGE_SECONDS, "end": now, "step": STEP_SECONDS}
    url = f"{address}/api/v1/{kind}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - the caller's own Prometheus
        data: list[Any] = json.load(answer)["data"]["result"]
    return data


def draw(panel: dict[str, Any], answers: list[tuple[dict[str, Any], list[Any]]]) -> str:
    """The inside of a panel as HTML."""
    if not any(series for _, series in answers):
        return "<p>No data"
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        value = float(answers[0][1][0]["values"][-1][1])
        return f'<div class="stat">{readable(value, unit)}</div>'
    if panel["type"] == "table":
        rows = [{**series["metric"], "nodes": series["value"][1]} for series in answers[0][1]]
        lines = ["".join(f"<td>{html.escape(text)}" for text in row.values()) for row in rows]
        return f"<table><tr>{''.join(f'<th>{name}' for name in rows[0])}<tr>{'<tr>'.join(lines)}</table>"
    place = panel["gridPos"]
    figure = Figure(
        figsize=((place["w"] * COLUMN_PIXELS - 24) / 100, (place["h"] * ROW_PIXELS - 40) / 100), dpi=100
    )
    figure.set_facecolor("#181b1f")
    axes = figure.add_axes((0.15, 0.3, 0.83, 0.66), facecolor="#181b1f")
    axes.grid(color="#2c3235")
    if panel["type"] == "heatmap":
        heatmap(axes, answers[0][1])
    else:
        curves(axes, panel, answers)
        axes.yaxis.set_major_formatter(lambda value, _: readable(value, unit))
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))  # type: ignore[no-untyped-call] # matplotlib's
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def curves(axes: Any, panel: dict[str, Any], answers: list[tuple[dict[str, Any], list[Any]]]) -> None:
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    below: dict[float, float] = {}
    for target, result in answers:
        for series in result:
            legend = target["legendFormat"]
            for name, value in series["metric"].items():
                legend = legend.replace(f"{{{{{name}}}}}", value)
            points = {float(at): float(value) for at, value in series["values"]}
            if stacked:
                points = {at: value + below.get(at, 0.0) for at, value in points.items()}
                below = points
            axes.plot(times(points), list(points.values()), lw=1, label=legend)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.15), fontsize=7, frameon=False, ncols=4)


def times(points: dict[float, float]) -> list[datetime]:
    return [datetime.fromtimestamp(at, UTC) for at in points]


def heatmap(axes: Any, result: list[Any]) -> None:
    """Runs by their size: what each bucket has more than the one below it."""
    series = sorted(result, key=lambda one: float(one["metric"]["le"]))
    below: dict[float, float] = {}
    for level, one in enumerate(series):
        points = {float(at): float(value) for at, value in one["values"]}
        more = {at: max(0.0, value - below.get(at, 0.0)) for at, value in points.items()}
        below = points
        at = times(more)
        axes.scatter(
            at, [level] * len(at), s=[4 * math.sqrt(v) for v in more.values()], marker="s", color="#ff9830"
        )
    axes.set_yticks(range(len(series)), [one["metric"]["le"] for one in series])


def readable(value: float, unit: str) -> str:
    """A value as Grafana writes it, nearly."""
    if math.isnan(value):
        return "–"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    return f"{value:.3g} " + {"reqps": "req/s", "µs": "µs"}.get(unit, "")


if __name__ == "__main__":
    main()
