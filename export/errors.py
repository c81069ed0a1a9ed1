"""The errors that an export ends in."""

from __future__ import annotations


class ExportError(Exception):
    """A checkpoint can't be exported; the message says what was expected, what came and what to do."""


class GateError(ExportError):
    """A graph isn't good enough; another way to quantize may do better."""
