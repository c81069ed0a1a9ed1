"""The one error that an export ends in."""

from __future__ import annotations


class ExportError(Exception):
    """A checkpoint can't be exported; the message says what was expected, what came and what to do."""
