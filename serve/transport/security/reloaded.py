"""What files say, read again when they change; files that are wrong leave in force what was read before."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

Content = TypeVar("Content")
_Stamp = tuple[tuple[int, int, int] | None, ...]


class Reloaded(Generic[Content]):
    """The content of files that belong together.

    Renewals replace one file after the other, so there are moments when they don't fit: then the old content
    stays, and the next look decides again.

    Args:
        flag: names the files in the log.
        paths: the files.
        read: reads and checks them all; raises SettingsError.

    Raises:
        SettingsError: the files are wrong at the start.

    Attributes:
        content: what was read last and was right.
    """

    def __init__(self, flag: str, paths: Sequence[Path], read: Callable[[], Content]) -> None:
        self._flag = flag
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self.content = read()

    def refresh(self) -> bool:
        """Look at the files; whether `content` is new. A few microseconds where nothing has changed."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            try:
                content = self._read()
            except SettingsError as error:
                self._seen = stamp
                logger.error("%s; what was read before stays in force", error)  # noqa: TRY400 - it says it all
                return False
            if self._stamp() != stamp:  # replaced while it was read: may be half of each
                return False
            self._seen = stamp
            self.content = content
            logger.info("%s: read again", self._flag)
            return True

    def _stamp(self) -> _Stamp:
        return tuple(_file_stamp(path) for path in self._paths)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with the file's content, links followed (Kubernetes swaps one); None: not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_bytes(flag: str, path: Path, limit: int) -> bytes:
    """A small file's content.

    Args:
        flag: the flag that names it, for the message.
        path: the file.
        limit: bytes that it may have.

    Raises:
        SettingsError: it can't be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise SettingsError(f"{flag} {path}: {error.strerror or error}") from error
    if len(content) > limit:
        raise SettingsError(f"{flag} {path} has more than {limit} bytes")
    return content


def warn_if_open(flag: str, path: Path) -> None:
    """Log a warning if every user of the machine may read a secret."""
    if path.stat().st_mode & 0o004:
        logger.warning("%s %s can be read by every user: chmod o-r %s", flag, path, path)
