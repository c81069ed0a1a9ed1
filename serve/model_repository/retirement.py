"""Closing model versions that no request can reach any more, beside the server's other work."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from serve.process import returning_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serve.model.served_version import ServedVersion

logger = logging.getLogger(__name__)


class Retirement:
    """Closes versions, each group on a thread of its own: a long run of one model holds no other up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: dict[str, list[threading.Thread]] = {}

    def retire(self, name: str, versions: Sequence[ServedVersion], then: Callable[[], None]) -> None:
        """Answer what the versions of a model have in hand, free them, give their memory back, call `then`.

        The caller keeps no reference to them: memory that is still in use can't be given back.
        """
        thread = threading.Thread(
            target=self._close, args=(name, list(versions), then), name=f"retire-{name}", daemon=True
        )
        with self._lock:
            self._threads.setdefault(name, []).append(thread)
            thread.start()

    def wait(self, name: str | None, seconds: float) -> bool:
        """Wait for this model's versions, or for all, to be gone; whether they are."""
        end = time.monotonic() + seconds
        with self._lock:
            threads = [t for key, group in self._threads.items() if name in (None, key) for t in group]
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _close(self, name: str, versions: list[ServedVersion], then: Callable[[], None]) -> None:
        with returning_memory():
            while versions:
                _close(versions.pop())
        then()
        with self._lock:
            group = self._threads[name]
            group.remove(threading.current_thread())
            if not group:
                del self._threads[name]


def _close(version: ServedVersion) -> None:
    try:
        version.close()
    except Exception:
        logger.exception("'%s' version %d did not close cleanly", version.name, version.version)
