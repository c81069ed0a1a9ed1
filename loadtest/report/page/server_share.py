"""What the server itself counted: where an answer's time went, and how many rows shared a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.report.page.axis import Axis, linear
from loadtest.report.page.layout import NOTHING, bullets, figure, side_by_side, table
from loadtest.report.page.markup import Markup, element, join
from loadtest.report.page.quantities import counted, grouped, milliseconds, percent
from loadtest.report.page.svg import across, column, hover, legend, plot, stacked_bar
from loadtest.server_side import STAGES

if TYPE_CHECKING:
    from loadtest.result import RunResult
    from loadtest.server_side import ModelSide

_NAMES = {
    "queue": "queue", "compute_input": "compute input", "compute_infer": "compute infer",
    "compute_output": "compute output", "rest": "transport and client",
}  # fmt: skip
# A part of a bar that is narrower has no room for its number.
_ROOM = 0.14
_LOW = 110
# Sizes with a tick each; more of them get every so many.
_MOST_TICKS = 8


def server_share(result: RunResult) -> Markup:
    """The stages of each model's answers, and the same as a table."""
    sides = {name: side for name, side in result.server.models.items() if side.requests}
    if not sides:
        return bullets(result.server.notes)
    services = {name: figures.service.mean for name, figures in result.per_model.items()}
    parts = {name: times_of(side, services.get(name, 0.0)) for name, side in sides.items()}
    bars = join(_bar(name, times) for name, times in parts.items() if sum(times.values()))
    keys = legend((name, "area", f"part {stage}") for stage, name in _NAMES.items())
    note = (
        "Each bar is the mean time of a model's answer, from the sending, as parts of the whole. The stages "
        "are the server's own count; transport and client is what they leave of what the client measured."
    )
    return join([
        figure("Where an answer's time goes", bars, keys, note) if bars else NOTHING,
        table(
            ["mean, ms", "requests", "failed", "queue", "input", "infer", "output", "server total",
             "transport, client", "client total", "rows a run"],
            [_row(name, sides[name], parts[name], services.get(name, 0.0)) for name in sides],
        ),
        bullets(result.server.notes),
    ])  # fmt: skip


def times_of(side: ModelSide, service: float) -> dict[str, float]:
    """Mean milliseconds of each stage, and the rest of the client's service time, if it was longer."""
    stages = {stage: float(getattr(side, stage)) for stage in STAGES}
    return stages | {"rest": max(0.0, service - sum(stages.values()))}


def _bar(model: str, times: dict[str, float]) -> Markup:
    whole = sum(times.values())
    parts = []
    for stage, time in times.items():
        share = time / whole
        said = f"{_NAMES[stage]}: {milliseconds(time)}, {percent(share)}"
        parts.append((share, stage, milliseconds(time) if share >= _ROOM else "", said))
    head = element(
        "div", element("span", model, class_="model"), element("span", milliseconds(whole)),
        class_="bar-head",
    )  # fmt: skip
    return join([head, stacked_bar(parts, f"{model}: mean time of an answer by stage")])


def _row(model: str, side: ModelSide, times: dict[str, float], service: float) -> list[str]:
    rows = f"{side.rows_per_run:.2f}" if side.executions else "–"
    stages = [f"{times[stage]:.3f}" for stage in STAGES]
    return [
        model, grouped(side.requests), grouped(side.failed), *stages, f"{side.total:.3f}",
        f"{times['rest']:.3f}" if service else "–", f"{service:.3f}" if service else "–", rows,
    ]  # fmt: skip


def batch_sizes(result: RunResult) -> Markup:
    """How many runs of the graph had how many rows; of models that never batched, a sentence."""
    found = {
        name: {int(size): count for size, count in side.batch_sizes.items()}
        for name, side in result.server.models.items() if side.batch_sizes
    }  # fmt: skip
    plots = [
        _sizes(name, sizes, result.server.models[name].rows_per_run)
        for name, sizes in found.items() if len(sizes) > 1
    ]  # fmt: skip
    same = [
        f"{name}: {counted(count, 'run')}, each of {counted(size, 'row')}"
        for name, sizes in found.items() if len(sizes) == 1 for size, count in sizes.items()
    ]  # fmt: skip
    return join([side_by_side(plots), bullets(same)])


def _sizes(model: str, sizes: dict[int, int], mean: float) -> Markup:
    largest, runs = max(sizes), sum(sizes.values())
    every = -(-largest // _MOST_TICKS)
    ticks = tuple((float(n), str(n)) for n in range(1, largest + 1) if n % every == 0 or n == 1)
    x = Axis(0.5, largest + 0.5, ticks, "rows of a run")
    y = linear(max(sizes.values()), "runs")
    # What happened at all is to be seen, next to what happened a thousand times more often.
    least = 1.5 / _LOW
    marks = [
        column((x.at(n - 0.38), x.at(n + 0.38)), (0, max(least, y.at(count))), "runs", _LOW)
        for n, count in sizes.items()
    ]
    marks += [
        hover(
            (x.at(n - 0.5), x.at(n + 0.5)),
            f"{counted(n, 'row')}: {counted(count, 'run')}, {percent(count / runs)}",
            _LOW,
        )
        for n, count in sizes.items()
    ]
    drawn = plot(x, y, marks, label=f"Batch sizes of {model}", height=_LOW)
    return figure(model, drawn, element("span", f"runs; mean {mean:.2f} rows", class_="legend"))


def bar_of(share: float, style: str) -> Markup:
    """A small bar within a table's cell."""
    rect = element("rect", x=0, y=0, width=across(share), height=10, class_=style)
    return element("svg", rect, width="100%", height=10, class_="cell-bar", aria_hidden="true")
