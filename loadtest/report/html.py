"""A result as one page of HTML that needs nothing else: no network, no script, its plots are SVG in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.report.page.distribution import model_curves, percentile_curve, stream_curves
from loadtest.report.page.layout import bullets, section
from loadtest.report.page.markup import Markup, element, join
from loadtest.report.page.server_share import batch_sizes, server_share
from loadtest.report.page.summary import conditions, headline, key_numbers, title_of, validity
from loadtest.report.page.tables import (
    environment,
    error_table,
    metrics_table,
    model_table,
    models_table,
    percentile_table,
    stream_table,
)
from loadtest.report.page.timeline import timeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.result import RunResult

_STYLE = Path(__file__).parent / "page" / "page.css"
# A browser that obeys it loads nothing and runs nothing, whatever a server has put into a message.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_html(result: RunResult, path: Path) -> None:
    """Write the page.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(result), encoding="utf-8")


def page(result: RunResult) -> str:
    """The page; parts that the result has nothing for are left out."""
    return document(f"Load test of {title_of(result)}: {result.verdict}", _sections(result))


def document(title: str, sections: Sequence[Markup]) -> str:
    """Sections as a page of their own."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(_STYLE.read_text())),
    )  # fmt: skip
    body = element("body", element("main", *sections))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _sections(result: RunResult) -> list[Markup]:
    return [
        headline(result),
        conditions(result),
        validity(result),
        key_numbers(result),
        section("Latency", percentile_curve(result), model_curves(result.per_model)),
        section("Over time", timeline(result)),
        section("Within the server", server_share(result)),
        section("Batch sizes", batch_sizes(result)),
        section("Errors", error_table(result)),
        section("Streams", stream_curves(result.per_model), stream_table(result)),
        section("Percentiles", percentile_table(result)),
        section("Per model", model_table(result)),
        section("Server's metrics", metrics_table(result)),
        section("Environment", join([models_table(result), environment(result)])),
        section("Notes", bullets(result.notes)),
    ]
