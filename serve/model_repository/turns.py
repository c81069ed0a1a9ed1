"""Turns: one change of a model at a time, of different models beside each other."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class Turns:
    """A lock per name that somebody wants, and a bound on how many may want one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Have a model to oneself.

        Raises:
            UnavailableError: as many as may be inside are.
        """
        with self._lock:
            if self._taken >= self._most:
                raise UnavailableError(f"{self._most} loads and unloads are under way or waiting: retry")
            self._taken += 1
            turn = self._turns.setdefault(name, _Turn())
            turn.users += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                self._taken -= 1
                turn.users -= 1
                if not turn.users:
                    del self._turns[name]
