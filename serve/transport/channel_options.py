"""The options of the gRPC server: what one connection, one message and one client may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.settings import ServerSettings

# Connections that never finish their handshake, or finish it and stay silent, are closed: each costs a file
# descriptor and memory. A client reconnects by itself with its next call.
_HANDSHAKE_MS = 20_000
_IDLE_MS = 3_600_000
# gRPC's own levels, in its order. It picks the algorithm among those that the client says it can read: gzip
# for low, deflate for the others.
_COMPRESSION_LEVELS = ("none", "low", "medium", "high")


def channel_options(settings: ServerSettings, largest_request: int) -> list[tuple[str, int]]:
    """Options for `grpc.server`.

    Args:
        settings: the server's.
        largest_request: bytes of the largest request that the models allow, where the settings name no limit.
    """
    return [
        ("grpc.so_reuseport", int(settings.reuse_grpc_port)),
        ("grpc.max_receive_message_length", settings.max_request_bytes or largest_request),
        ("grpc.max_send_message_length", -1),
        # Between the two, gRPC would refuse at random.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        # More than this at once would be refused anyway, and a client that opens and resets streams as fast
        # as it can is held to it.
        ("grpc.max_concurrent_streams", settings.max_inflight_requests + settings.max_streams),
        # It counts streams that are over but not yet freed, and resets calls that a client was right to
        # queue: 750 of 1000 at once. Without it a rapid reset of 80 000 calls costs nothing more.
        ("grpc.http.overload_protection", 0),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        *_keepalive(settings),
        *_compression(settings.grpc_infer_response_compression_level),
    ]


def _keepalive(settings: ServerSettings) -> list[tuple[str, int]]:
    """Pings, those that clients may send, and how old a connection may get: Triton's flags, one for one."""
    least_interval = settings.grpc_http2_min_recv_ping_interval_without_data
    options = {
        "grpc.keepalive_time_ms": settings.grpc_keepalive_time,
        "grpc.keepalive_timeout_ms": settings.grpc_keepalive_timeout,
        # In newer gRPC this one closes the connection, and by default after a minute whatever the other says.
        "grpc.http2.ping_timeout_ms": settings.grpc_keepalive_timeout,
        "grpc.keepalive_permit_without_calls": int(settings.grpc_keepalive_permit_without_calls),
        "grpc.http2.max_pings_without_data": settings.grpc_http2_max_pings_without_data,
        "grpc.http2.min_ping_interval_without_data_ms": least_interval,
        "grpc.http2.max_ping_strikes": settings.grpc_http2_max_ping_strikes,
    }
    ages = {
        "grpc.max_connection_age_ms": settings.grpc_max_connection_age,
        "grpc.max_connection_age_grace_ms": settings.grpc_max_connection_age_grace,
    }
    return [*options.items(), *((name, value) for name, value in ages.items() if value)]


def _compression(level: str) -> list[tuple[str, int]]:
    if level == _COMPRESSION_LEVELS[0]:
        return []
    return [("grpc.default_compression_level", _COMPRESSION_LEVELS.index(level))]
