"""Who may ask, and over what: TLS, tokens, restricted groups of RPCs."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from serve.transport.security.interceptor import AccessInterceptor
from serve.transport.security.protocol_groups import parse_restrictions
from serve.transport.security.tls import server_credentials
from serve.transport.security.tokens import Tokens

if TYPE_CHECKING:
    import grpc

    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)


class Security:
    """What the settings say about access, read and checked once, before the models load.

    Raises:
        SettingsError: a file or an option can't be used; the message names the flag.

    Attributes:
        interceptors: for `grpc.server`; none where no access rule is configured, which costs nothing.
    """

    def __init__(self, settings: ServerSettings) -> None:
        host, self._port = settings.grpc_address, settings.grpc_port
        self._host = f"[{host}]" if ":" in host else host
        self._credentials = server_credentials(settings)
        tokens = Tokens(Path(settings.auth_token_file)) if settings.auth_token_file else None
        restrictions = parse_restrictions(settings.grpc_restricted_protocol)
        secrets = tokens is not None or bool(restrictions)
        self.interceptors: list[grpc.ServerInterceptor] = (
            [AccessInterceptor(tokens, restrictions, health_needs_token=settings.auth_health)]
            if secrets
            else []
        )
        if secrets and self._credentials is None and not _is_loopback(host):
            logger.warning(
                "tokens and keys cross the network at %s in plain text: add --grpc-use-ssl, or a proxy that "
                "does TLS in front of --grpc-address=127.0.0.1",
                host,
            )

    def add_port(self, server: grpc.Server) -> int:
        """Bind the settings' address, with TLS if they say so; the port.

        Raises:
            RuntimeError: it can't be bound.
        """
        address = f"{self._host}:{self._port}"
        if self._credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._credentials)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
