"""The end of the server's connections, in a way that clients understand."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
import termios
import time
from pathlib import Path

_OPEN_FILES = Path("/proc/self/fd")
_SECONDS_BETWEEN_LOOKS = 0.002


def hang_up(port: int, timeout: float) -> None:
    """Close a port of this process, and its connections once what was written to them has arrived.

    To be called before gRPC's own stop, which answers CANCELLED to calls that race with it, though nobody
    began them, and leaves some clients waiting for ever: 9 and 8 calls in 60 stops under 12 clients that
    come back 20 ms after each refusal. That a connection was closed is UNAVAILABLE to all of them, and they
    try again elsewhere. gRPC logs that it can't accept any more. Where the system has no /proc, nothing is
    closed.

    Args:
        port: the local end's.
        timeout: seconds that what was written may take to arrive.
    """
    for listener in _sockets(port, listening=True):  # so that nobody comes back in the meantime
        _close(listener)
    connections = _sockets(port, listening=False)
    end = time.monotonic() + timeout
    waiting = connections
    while (waiting := [each for each in waiting if _unconfirmed_bytes(each)]) and time.monotonic() < end:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    for connection in connections:
        _close(connection)


def _close(opened: socket.socket) -> None:
    """End it for everyone who has it open, gRPC among them."""
    with contextlib.suppress(OSError), opened:  # the client may have closed it
        opened.shutdown(socket.SHUT_RDWR)


def _sockets(port: int, *, listening: bool) -> list[socket.socket]:
    """Sockets of our own on each listener or connection of gRPC's, which gives none out."""
    if not _OPEN_FILES.is_dir():
        return []
    found = []
    for entry in _OPEN_FILES.iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            number = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            opened = socket.socket(fileno=os.dup(number))
            if _is_at(opened, port, listening=listening):
                found.append(opened)
            else:
                opened.close()
    return found


def _is_at(opened: socket.socket, port: int, *, listening: bool) -> bool:
    if opened.family not in (socket.AF_INET, socket.AF_INET6) or opened.getsockname()[1] != port:
        return False
    if listening:
        return bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    try:
        opened.getpeername()
    except OSError:  # not connected, such as a listener that was closed
        return False
    return True


def _unconfirmed_bytes(connection: socket.socket) -> int:
    """Bytes written that the other end has not confirmed (SIOCOUTQ of Linux)."""
    count = struct.pack("i", 0)
    with contextlib.suppress(OSError):
        count = fcntl.ioctl(connection, termios.TIOCOUTQ, count)
    return int(struct.unpack("i", count)[0])
