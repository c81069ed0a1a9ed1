"""Warnings that clients could make come thousands a second: one now and then."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

_SECONDS = 10.0


class Occasionally:
    """Logs a warning, and then none for ten seconds; the next one says how many were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._next = 0.0
        self._left_out = 0

    def warn(self, text: str) -> None:
        """Log this, or count it."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
            self._next = now + _SECONDS
        more = f" (and {left_out} more like it before)" if left_out else ""
        self._logger.warning("%s%s", text, more)
