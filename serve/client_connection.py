"""How the commands that ask a server reach it: the flags that they share, and the channel."""

from __future__ import annotations

import argparse
from pathlib import Path

import grpc

_LONGEST_TIMEOUT = 1e9  # seconds; gRPC takes far more, and infinity, for a deadline that has passed


def add_connection_flags(parser: argparse.ArgumentParser, timeout: float) -> None:
    """Add the flags that say which server, which version of the model, and how to get there.

    Args:
        parser: of the command.
        timeout: seconds until an RPC is given up, unless the flag says otherwise.
    """
    group = add_channel_flags(parser, timeout)
    group.add_argument("--version", "-x", default="", help="model version (default: the latest)")


def add_channel_flags(
    parser: argparse.ArgumentParser, timeout: float, url: str = "localhost:8001"
) -> argparse._ArgumentGroup:
    """Add the flags that say which server and how to get there.

    Args:
        parser: of the command.
        timeout: seconds until an RPC is given up, unless the flag says otherwise.
        url: the server, unless the flag says otherwise.

    Returns:
        the group that they are in.
    """
    group = parser.add_argument_group("connection")
    group.add_argument("--url", "-u", default=url, help="the server (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=timeout, help="seconds (default: %(default)s)")
    group.add_argument(
        "--header",
        "-H",
        type=_header,
        action="append",
        metavar="'NAME: VALUE'",
        help="such as 'authorization: Bearer TOKEN'; may be given more than once",
    )
    group.add_argument("--ssl", action="store_true", help="TLS, with the system's certificates")
    group.add_argument("--root-cert", type=Path, metavar="FILE", help="TLS, with these certificates, PEM")
    group.add_argument("--client-cert", type=Path, metavar="FILE", help="this client's certificate, PEM")
    group.add_argument("--client-key", type=Path, metavar="FILE", help="and its key, PEM")
    group.add_argument(
        "--ssl-server-name",
        metavar="NAME",
        help="that the server's certificate names, where it isn't the URL's",
    )
    return group


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name.strip() and colon):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 'NAME: VALUE'")
    return name.strip().lower(), value.strip()


def check_connection(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """End the process with a message where the flags of a connection don't fit together; the flags."""
    if bool(options.client_cert) != bool(options.client_key):
        parser.error("--client-cert and --client-key go together: a certificate and the key to it")
    if not 0 < options.timeout <= _LONGEST_TIMEOUT:
        parser.error(f"--timeout: expected above 0 and up to {_LONGEST_TIMEOUT:g}, got {options.timeout:g}")
    if options.url.startswith(("http://", "https://", "grpc://", "grpcs://")):
        parser.error(f"--url is {options.url!r}, expected HOST:PORT, without a scheme")
    return options


def open_channel(options: argparse.Namespace) -> grpc.Channel:
    """A channel to the server that the flags name; it connects when it is used.

    Raises:
        OSError: a certificate's file can't be read.
    """
    files = (options.root_cert, options.client_key, options.client_cert)
    if not _with_tls(options):
        return grpc.insecure_channel(options.url)
    read = (path.read_bytes() if path else None for path in files)
    names = [("grpc.ssl_target_name_override", options.ssl_server_name)] if options.ssl_server_name else []
    return grpc.secure_channel(options.url, grpc.ssl_channel_credentials(*read), names)


def describe(error: grpc.RpcError, options: argparse.Namespace) -> str:
    """A failed call in one line: server, status, what the server said."""
    details = " ".join((error.details() or "").split())
    if details.endswith("Socket closed") and not _with_tls(options):
        details += " (if the server has TLS: --ssl or --root-cert)"
    return f"{options.url}: {error.code().name}: {details}"


def _with_tls(options: argparse.Namespace) -> bool:
    return bool(
        options.ssl
        or options.root_cert
        or options.client_cert
        or options.client_key
        or options.ssl_server_name
    )
