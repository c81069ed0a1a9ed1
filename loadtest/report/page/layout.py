"""The page's blocks: sections, figures with their legends, tables, lists of names and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.report.page.markup import Markup, element, join

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NOTHING = Markup()


def section(title: str, *content: str) -> Markup:
    """A part of the page with its heading; nothing if it has no content."""
    kept = [part for part in content if part]
    return element("section", element("h2", title), *kept) if kept else NOTHING


def figure(title: str, plot: Markup, legend: Markup = NOTHING, note: str = "") -> Markup:
    """A plot below its title and legend, and above a sentence on it."""
    caption = element("figcaption", element("strong", title), " ", legend)
    return element("figure", caption, plot, element("p", note, class_="note") if note else NOTHING)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], style: str = "numbers") -> Markup:
    """A table whose first column names the rows; it scrolls where the page is too narrow for it.

    Args:
        header: of the columns.
        rows: of cells: text, or markup.
        style: `numbers`, which stand to the right, or `texts`.
    """
    head = element("tr", *(element("th", text, scope="col") for text in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in rows
    ]
    if not body:
        return NOTHING
    content = element("table", element("thead", head), element("tbody", *body), class_=style)
    return element("div", content, class_="scroll", tabindex=0)


def names(values: Mapping[str, str]) -> Markup:
    """Names with their values, those without left out."""
    pairs = [
        element("div", element("dt", name), element("dd", value)) for name, value in values.items() if value
    ]
    return element("dl", *pairs) if pairs else NOTHING


def bullets(texts: Iterable[str], style: str | None = None) -> Markup:
    """A list of sentences."""
    items = [element("li", text) for text in texts]
    return element("ul", *items, class_=style) if items else NOTHING


def details(summary: str, content: Markup) -> Markup:
    """Content that opens when it is asked for; nothing of nothing."""
    return element("details", element("summary", summary), content) if content else NOTHING


def side_by_side(blocks: Iterable[Markup]) -> Markup:
    """Blocks in a row, or below each other where there is no room."""
    content = join(blocks)
    return element("div", content, class_="beside") if content else NOTHING
