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
    """Close the connections to a port of this process, once what was written to them has arrived.

    gRPC's own stop resets the calls that race with it, and their clients see CANCELLED for a request that
    nobody began. That a connection was closed is UNAVAILABLE to them, which they try again elsewhere. Where
    the system has no /proc, nothing is closed.

    Args:
        port: the local end's.
        timeout: seconds that what was written may take to arrive.
    """
    connections = _connections(port)
    end = time.monotonic() + timeout
    waiting = connections
    while (waiting := [each for each in waiting if _unconfirmed_bytes(each)]) and time.monotonic() < end:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    for connection in connections:
        with contextlib.suppress(OSError), connection:  # the client may have closed it
            connection.shutdown(socket.SHUT_RDWR)


def _connections(port: int) -> list[socket.socket]:
    """Sockets of our own on each connection of gRPC's, which gives none out."""
    if not _OPEN_FILES.is_dir():
        return []
    found = []
    for entry in _OPEN_FILES.iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            number = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(number))
            if _is_connection_to(connection, port):
                found.append(connection)
            else:
                connection.close()
    return found


def _is_connection_to(connection: socket.socket, port: int) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return not listens and connection.getsockname()[1] == port


def _unconfirmed_bytes(connection: socket.socket) -> int:
    """Bytes written that the other end has not confirmed (SIOCOUTQ of Linux)."""
    count = struct.pack("i", 0)
    with contextlib.suppress(OSError):
        count = fcntl.ioctl(connection, termios.TIOCOUTQ, count)
    return int(struct.unpack("i", count)[0])
