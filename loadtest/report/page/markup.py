"""HTML and SVG from elements: text is escaped unless it is markup already, so a server can't write any.

What it makes is XML, too: every element is closed, every attribute has a value.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# No file in UTF-8 can hold a lone surrogate, and no XML a control character.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VOID = ("link", "meta")


class Markup(str):
    """Text that is markup, made by this module; any other text is escaped where it is put in."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of it.
        content: markup, or text, which is escaped.
        attributes: with `_` for `-` within and nothing at the end: `class_`, `text_anchor`; None: left out.
    """
    written = (_attribute(key, value) for key, value in attributes.items() if value is not None)
    start = "".join([name, *written])
    return Markup(f"<{start}/>" if name in _VOID else f"<{start}>{join(content)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Markup and texts one after the other, the texts escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escaped(part) for part in parts))


def escaped(text: str) -> Markup:
    """A text as markup, whatever it holds."""
    return Markup(escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)))


def _attribute(key: str, value: object) -> str:
    return f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
