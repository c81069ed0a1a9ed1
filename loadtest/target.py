"""The server under test: where it is, how it is reached, what it says of itself."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc

from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

SERVICE = "/inference.GRPCInferenceService"
INFER_PATH = f"{SERVICE}/ModelInfer"
STREAM_PATH = f"{SERVICE}/ModelStreamInfer"
QUESTION_SECONDS = 10.0
_READY_PAUSE = 0.1
# Each channel a connection of its own, which gRPC would otherwise share; messages of any size.
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that is started again is found again at once, not after gRPC's growing pauses.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class TargetError(Exception):
    """The server, or what it was asked for, isn't there; the message is for the user."""


@dataclass(frozen=True)
class Target:
    """A server that speaks the Open Inference Protocol.

    Attributes:
        url: host:port.
        headers: sent with every call.
        tls: whether the connection is encrypted.
        root_certificates, private_key, certificate_chain: PEM; None: the system's, and no client certificate.
        server_name: the name that the server's certificate must have, where it isn't the url's.
    """

    url: str = "localhost:8001"
    headers: tuple[tuple[str, str], ...] = ()
    tls: bool = False
    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str = ""

    def open_channel(self) -> grpc.Channel:
        """A new connection; it connects when it is used."""
        options: list[tuple[str, Any]] = list(_OPTIONS)
        if not self.tls:
            return grpc.insecure_channel(self.url, options)
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        files = (self.root_certificates, self.private_key, self.certificate_chain)
        return grpc.secure_channel(self.url, grpc.ssl_channel_credentials(*files), options)


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which server, and how to get there; the names are those of `onnxedge infer`."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", "-u", default="localhost:8001", help="host:port (default: %(default)s)")
    group.add_argument(
        "--header",
        "-H",
        type=_header,
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="such as 'authorization: Bearer TOKEN'; may be given more than once",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="send its first token as a bearer token"
    )
    group.add_argument("--ssl", action="store_true", help="TLS, with the system's certificates")
    group.add_argument("--root-cert", type=Path, metavar="FILE", help="TLS, with these certificates, PEM")
    group.add_argument("--client-cert", type=Path, metavar="FILE", help="this client's certificate, PEM")
    group.add_argument("--client-key", type=Path, metavar="FILE", help="and its key, PEM")
    group.add_argument("--ssl-server-name", default="", metavar="NAME", help="the name in its certificate")
    group.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for the server to be ready"
    )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name.strip() and colon):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 'NAME: VALUE'")
    return name.strip().lower(), value.strip()


def target_of(options: argparse.Namespace) -> Target:
    """The server that the flags name.

    Raises:
        TargetError: a file can't be read.
    """
    paths = (options.root_cert, options.client_key, options.client_cert)
    headers = list(options.header)
    try:
        roots, key, chain = (path.read_bytes() if path else None for path in paths)
        if options.token_file:
            headers.append(("authorization", f"Bearer {_first_token(options.token_file)}"))
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"a certificate's or token's file: {error}") from error
    url = options.url
    for scheme in ("grpc://", "http://", "grpcs://", "https://"):
        url = url.removeprefix(scheme)
    tls = options.ssl or any(paths) or options.url.startswith(("grpcs://", "https://"))
    return Target(url, tuple(headers), tls, roots, key, chain, options.ssl_server_name)


def _first_token(path: Path) -> str:
    """The first line of a token file that is no comment, as the server's --auth-token-file has them."""
    lines = (line.strip() for line in path.read_text().splitlines())
    token = next((line for line in lines if line and not line.startswith("#")), "")
    if not token:
        raise TargetError(f"token file '{path}' has no token")
    return token


class Questions:
    """What is asked of the server beside the load: metadata, statistics, loading. Ends with its block."""

    def __init__(self, target: Target, timeout: float = QUESTION_SECONDS) -> None:
        self.target = target
        self.timeout = timeout
        self._channel = target.open_channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._channel.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for the server to say that it is ready.

        Raises:
            TargetError: it doesn't within that time, or refuses to answer.
        """
        end = time.monotonic() + seconds
        try:
            grpc.channel_ready_future(self._channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise TargetError(f"{self.target.url}: nothing answers within {seconds:g} s") from None
        while not self.ask("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready:
            if time.monotonic() > end:
                raise TargetError(f"{self.target.url}: the server is not ready within {seconds:g} s")
            time.sleep(_READY_PAUSE)

    def ask(self, method: str, request: Any, kind: Any) -> Any:
        """One call of the server.

        Raises:
            TargetError: the call failed, in one line: server, status, what it said.
        """
        call: Callable[..., Any] = self._channel.unary_unary(
            f"{SERVICE}/{method}", type(request).SerializeToString, kind.FromString
        )
        try:
            return call(request, timeout=self.timeout, metadata=self.target.headers)
        except grpc.RpcError as error:
            details = " ".join((error.details() or "").split())
            raise TargetError(f"{self.target.url}: {error.code().name}: {details}") from error

    def metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """A model's metadata.

        Raises:
            TargetError: the server isn't there, or doesn't have the model.
        """
        request = pb.ModelMetadataRequest(name=model, version=version)
        found: pb.ModelMetadataResponse = self.ask("ModelMetadata", request, pb.ModelMetadataResponse)
        return found

    def config(self, model: str, version: str = "") -> Any:
        """A model's config; an empty one of a server that doesn't tell (the RPC is Triton's extension)."""
        request = pb.ModelConfigRequest(name=model, version=version)
        try:
            return self.ask("ModelConfig", request, pb.ModelConfigResponse).config
        except TargetError as error:
            if (
                isinstance(error.__cause__, grpc.RpcError)
                and error.__cause__.code() is grpc.StatusCode.UNIMPLEMENTED
            ):
                return pb.ModelConfigResponse().config
            raise
