"""`onnxedge health`: does a server, or one of its models, serve? For container engines."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from serve.client_connection import add_channel_flags, check_connection, describe, open_channel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DEFAULT_PORT = "8001"
_FLAGS = "ONNXEDGE_HEALTH_FLAGS"


class HealthError(Exception):
    """The question can't be asked; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Ask once and print the answer; 0 only for SERVING."""
    options = _parse(arguments, os.environ)
    try:
        metadata = [*(options.header or ()), *_bearer(options.token_file)]
        with open_channel(options) as channel:
            stub: Any = HealthStub(channel)
            answer = stub.Check(
                HealthCheckRequest(service=options.service), timeout=options.timeout, metadata=metadata
            )
    except grpc.RpcError as error:
        print(f"onnxedge health: {describe(error, options)}", file=sys.stderr)
        return 1
    except (HealthError, OSError) as error:
        print(f"onnxedge health: {error}", file=sys.stderr)
        return 1
    print(HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == HealthCheckResponse.SERVING else 1


def _parse(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The flags; port and token file are those of the server that was set up by the same variables.

    So the health check of a container needs no flags in most cases; where it does (TLS), they come in a
    variable of their own, for an image without a shell can't be given another command by `docker run`.
    """
    parser = argparse.ArgumentParser(
        prog="onnxedge health",
        description=__doc__,
        epilog=f"{_FLAGS} may hold flags, too: those on the command line count more.",
    )
    parser.add_argument("service", nargs="?", default="", help="a model's name (default: the whole server)")
    parser.add_argument(
        "--token-file",
        "--auth-token-file",
        type=Path,
        default=environment.get("ONNXEDGE_AUTH_TOKEN_FILE"),
        metavar="FILE",
        help="the server's file of tokens, whose first is sent (default: ONNXEDGE_AUTH_TOKEN_FILE)",
    )
    port = environment.get("ONNXEDGE_GRPC_PORT", _DEFAULT_PORT)
    add_channel_flags(parser, timeout=3.0, url=f"localhost:{port}")
    try:
        flags = shlex.split(environment.get(_FLAGS, ""))
    except ValueError as error:
        parser.error(f"{_FLAGS} is {environment[_FLAGS]!r}: {error}")
    return check_connection(parser, parser.parse_args([*flags, *arguments]))


def _bearer(path: Path | None) -> list[tuple[str, str]]:
    """The header that the server's tokens are sent in; none without a file."""
    if path is None:
        return []
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    token = next((line for line in lines if line and not line.startswith("#")), None)
    if token is None:
        raise HealthError(f"{path} holds no token")
    return [("authorization", f"Bearer {token}")]
