"""Bearer tokens (RFC 6750): a file of them, and whether a request's metadata holds one."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from typing import TYPE_CHECKING

from serve.settings import SettingsError
from serve.transport.security.reloaded import Reloaded, read_bytes, warn_if_open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_FLAG = "--auth-token-file"
_HEADER = "authorization"
_SHORTEST = 16
# Each request is compared with every token: 1000 of them take about 0.2 ms.
_MOST_TOKENS = 1000
_LARGEST_FILE = 1 << 20
# Long enough to cost nothing, short enough for a token to be withdrawn at once.
_SECONDS_BETWEEN_LOOKS = 1.0
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class Tokens:
    """The tokens that are let in: one a line of a file, lines that begin with # are comments.

    Only their hashes are kept. The file is looked at once a second at most; if it is wrong then, the tokens
    that were read before stay in force, and the log says so.

    Args:
        path: the file.
        clock: monotonic seconds.

    Raises:
        SettingsError: the file can't be read, holds no token, or one that is too short or no token.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._hashes = Reloaded(_FLAG, [path], lambda: _read(path))
        self._clock = clock
        self._next_look = clock() + _SECONDS_BETWEEN_LOOKS
        warn_if_open(_FLAG, path)

    def accept(self, token: str) -> bool:
        """Whether it is one of them. Takes as long for each wrong token, whatever it looks like."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + _SECONDS_BETWEEN_LOOKS
            self._hashes.refresh()
        digest = _digest(token)
        found = False
        for known in self._hashes.content:
            found |= hmac.compare_digest(known, digest)
        return found


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The token in a request's metadata; None without one, or with several."""
    values = [value for name, value in metadata if name == _HEADER]
    if len(values) != 1 or not isinstance(values[0], str):
        return None
    scheme, _, token = values[0].partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(path: Path) -> tuple[bytes, ...]:
    text = read_bytes(_FLAG, path, _LARGEST_FILE).decode(errors="replace")
    hashes: dict[bytes, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < _SHORTEST:
            raise SettingsError(f"{_FLAG} {path}, line {number}: expected {_SHORTEST} characters or more")
        if not _TOKEN.fullmatch(token):
            raise SettingsError(
                f"{_FLAG} {path}, line {number}: expected letters, digits and -._~+/ alone, then = if need be"
            )
        hashes[_digest(token)] = None
    if not 0 < len(hashes) <= _MOST_TOKENS:
        raise SettingsError(f"{_FLAG} {path} holds {len(hashes)} tokens, expected 1 to {_MOST_TOKENS}")
    return tuple(hashes)
