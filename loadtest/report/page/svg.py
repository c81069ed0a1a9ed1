"""Plots as SVG that fits any width: places across are percents of it, so that text keeps its size.

A plot is an `<svg>` whose box is the plotting area alone; labels stand outside of it, in margins that the
page's style sheet leaves. Lines lie in a nested `<svg>` that is stretched to the box, their strokes are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.report.page.markup import Markup, element, join

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loadtest.report.page.axis import Axis

# Units of a stretched plot's width, and pixels of heights.
_WIDTH = 1000
HEIGHT = 220
_TICK_ROOM, _TITLE_ROOM = 20, 42
_CROWDED = 0.11


def across(fraction: float) -> str:
    """A place from left to right, or a width."""
    return f"{100 * fraction:.6g}%"


def down(fraction: float, height: int = HEIGHT) -> str:
    """A place from the bottom up, in pixels from the top."""
    return f"{(1 - fraction) * height:.1f}"


def plot(x: Axis, y: Axis, marks: Iterable[Markup], *, label: str, height: int = HEIGHT) -> Markup:
    """Axes with what is drawn between them.

    Args:
        x: the axis below, with its title.
        y: the axis at the left; its title belongs into the caption.
        marks: drawn in order, the last on top.
        label: what a screen reader says.
        height: of the plotting area.
    """
    room = _TITLE_ROOM if x.title else _TICK_ROOM
    return element(
        "svg", *_grid(y, height), *_places(x, height), *marks,
        class_="plot", role="img", aria_label=label, width="100%", height=height + room,
    )  # fmt: skip


def _grid(y: Axis, height: int) -> list[Markup]:
    found: list[Markup] = []
    for value, text in y.ticks:
        at = down(y.at(value), height)
        found += [
            element("line", x1=0, x2="100%", y1=at, y2=at, class_="grid"),
            element("text", text, x=-8, y=at, dy=".32em", class_="tick end"),
        ]
    return found


def _places(x: Axis, height: int) -> list[Markup]:
    found = [element("line", x1=0, x2="100%", y1=height, y2=height, class_="baseline")]
    # On a percentile axis 50 % is next to 0 %, whose label gives way into the margin.
    crowded = len(x.ticks) > 1 and x.at(x.ticks[1][0]) < _CROWDED
    for n, (value, text) in enumerate(x.ticks):
        at = across(x.at(value))
        anchor = "end" if crowded and not n else "middle"
        found += [
            element("line", x1=at, x2=at, y1=height, y2=height + 4, class_="baseline"),
            element("text", text, x=at, y=height + 16, class_=f"tick {anchor}"),
        ]
    if x.title:
        found.append(element("text", x.title, x="50%", y=height + 35, class_="tick middle"))
    return found


def line(
    x: Axis, y: Axis, points: Iterable[tuple[float, float] | None], style: str, height: int = HEIGHT
) -> Markup:
    """A line through points; None: it is interrupted there."""
    runs: list[list[str]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(f"{_WIDTH * x.at(point[0]):.1f},{(1 - y.at(point[1])) * height:.1f}")
    lines = [_polyline(run, style) for run in runs if run]
    return element(
        "svg", *lines, viewBox=f"0 0 {_WIDTH} {height}", width="100%", height=height,
        preserveAspectRatio="none", class_="stretched",
    )  # fmt: skip


def _polyline(run: list[str], style: str) -> Markup:
    """A point alone is a line to itself, of which the round ends are seen."""
    if len(run) == 1:
        return element("polyline", points=f"{run[0]} {run[0]}", class_=f"line point {style}")
    return element("polyline", points=" ".join(run), class_=f"line {style}")


def column(x: tuple[float, float], y: tuple[float, float], style: str, height: int = HEIGHT) -> Markup:
    """A rectangle between two places across and two from the bottom up, all of them fractions."""
    top = (1 - y[1]) * height
    return element(
        "rect", x=across(x[0]), width=across(max(0.0, x[1] - x[0])), y=f"{top:.1f}",
        height=f"{max(0.0, (y[1] - y[0]) * height):.1f}", class_=style,
    )  # fmt: skip


def whisker(x: float, low: float, high: float, style: str, height: int = HEIGHT) -> Markup:
    """From one place up to another, with a bar at the upper end."""
    top, place = down(high, height), across(x)
    bar = element(
        "rect", x=place, y=top, width=10, height=2, transform="translate(-5 -1)", class_=f"cap {style}"
    )
    return join(
        [element("line", x1=place, x2=place, y1=down(low, height), y2=top, class_=f"whisker {style}"), bar]
    )


def hover(x: tuple[float, float], text: str, height: int = HEIGHT) -> Markup:
    """A part of the plot, from top to bottom, that says something when it is pointed at."""
    return element(
        "rect", element("title", text), x=across(x[0]), width=across(max(0.0, x[1] - x[0])), y=0,
        height=height, class_="hover",
    )  # fmt: skip


def stacked_bar(parts: Sequence[tuple[float, str, str, str]], label: str, height: int = 26) -> Markup:
    """A bar of the whole width.

    Args:
        parts: of each its share of the bar, style, text to show on it, and text when it is pointed at.
        label: what a screen reader says.
        height: in pixels.
    """
    drawn: list[Markup] = []
    start = 0.0
    for share, style, text, title in parts:
        shape = element(
            "rect", element("title", title), x=across(start), width=across(share), y=0, height=height,
            class_=f"part {style}",
        )  # fmt: skip
        middle = across(start + share / 2)
        drawn += [
            shape,
            *(
                [element("text", text, x=middle, y=height / 2, dy=".34em", class_=f"on {style}")]
                if text
                else []
            ),
        ]
        start += share
    return element("svg", *drawn, class_="bar", role="img", aria_label=label, width="100%", height=height)


def legend(entries: Iterable[tuple[str, str, str]]) -> Markup:
    """What is drawn means: of each its name, whether it is a `line`, an `area` or a `whisker`, its style."""
    return element("span", *(_entry(*entry) for entry in entries), class_="legend")


def _entry(name: str, kind: str, style: str) -> Markup:
    shapes = {
        "line": element("line", x1=1, x2=25, y1=6, y2=6, class_=f"line {style}"),
        "area": element("rect", x=0, y=0, width=12, height=12, class_=style),
        "whisker": join([
            element("line", x1=6, x2=6, y1=1, y2=12, class_=f"whisker {style}"),
            element("rect", x=1, y=0, width=10, height=2, class_=f"cap {style}"),
        ]),
    }  # fmt: skip
    width = 26 if kind == "line" else 12
    swatch = element("svg", shapes[kind], width=width, height=12, aria_hidden="true", class_="swatch")
    return element("span", swatch, name, class_="key")
