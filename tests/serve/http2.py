"""Raw HTTP/2 (RFC 9113), for what gRPC's own client hides or would never do."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE = 3, 4, 6


class Connection:
    """A connection whose settings are the client's first words, and without any stream."""

    def __init__(self, port: int, settings: bytes = b"") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, settings))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, payload) of what comes, until the server closes."""
        with self._socket, self._socket.makefile("rb") as stream:
            while len(head := stream.read(9)) == 9:
                yield head[3], head[4], stream.read(int.from_bytes(head[:3]))


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def call(stream: int, path: str, message: bytes) -> bytes:
    """The frames of a gRPC call with one request. Headers are literal: RFC 7541, section 6.2.2."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in pair) for pair in headers.items()
    )
    prefixed = b"\0" + len(message).to_bytes(4) + message
    return frame(HEADERS, block, END_HEADERS, stream) + frame(DATA, prefixed, END_STREAM, stream)
