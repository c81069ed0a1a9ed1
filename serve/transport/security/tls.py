"""TLS and mutual TLS, with certificates that are renewed while the server runs.

gRPC asks for the certificates with every new connection, and connections that are open keep theirs.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from serve.settings import SettingsError
from serve.transport.security.reloaded import Reloaded, read_bytes, warn_if_open

if TYPE_CHECKING:
    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

_CERT, _KEY, _ROOT = "--grpc-server-cert", "--grpc-server-key", "--grpc-root-cert"
_LARGEST_FILE = 1 << 20
# A handshake in TLS 1.3 takes two rounds, in TLS 1.2 three.
_MOST_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files: the server's chain, its key, and for mutual TLS the roots of the clients' certificates."""

    chain: Path
    key: Path
    roots: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """All files that there are."""
        return [path for path in (self.chain, self.key, self.roots) if path is not None]


def certificate_files(settings: ServerSettings) -> CertificateFiles | None:
    """The files that the settings name; None without TLS.

    Raises:
        SettingsError: one is missing, or the files are there and TLS is not asked for: who names a
            certificate must not get plain text.
    """
    mutual = settings.grpc_use_ssl_mutual
    given = {
        _CERT: settings.grpc_server_cert,
        _KEY: settings.grpc_server_key,
        _ROOT: settings.grpc_root_cert,
    }
    if not (settings.grpc_use_ssl or mutual):
        if any(given.values()):
            named = next(flag for flag, value in given.items() if value)
            raise SettingsError(f"{named} is given without --grpc-use-ssl: add it, or leave the file out")
        return None
    for flag, value in given.items():
        if not value and (flag != _ROOT or mutual):
            raise SettingsError(f"{flag} is missing: --grpc-use-ssl{'-mutual' * mutual} needs it")
    if given[_ROOT] and not mutual:
        logger.warning("%s has no effect without --grpc-use-ssl-mutual: any client may connect", _ROOT)
    return CertificateFiles(Path(given[_CERT]), Path(given[_KEY]), Path(given[_ROOT]) if mutual else None)


def server_credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """What a TLS port is opened with; None without TLS.

    Raises:
        SettingsError: a file is missing or wrong, the key belongs to another certificate, or the certificate
            is not valid now.
    """
    files = certificate_files(settings)
    if files is None:
        return None
    reloaded = Reloaded(_CERT, files.paths, lambda: _read(files))
    warn_if_open(_KEY, files.key)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return reloaded.content if reloaded.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        reloaded.content,
        fetch,  # type: ignore[arg-type]  # the stubs leave out None, "as before"
        require_client_authentication=files.roots is not None,
    )


def _read(files: CertificateFiles) -> grpc.ServerCertificateConfiguration:
    chain, key = (read_bytes(*file, _LARGEST_FILE) for file in ((_CERT, files.chain), (_KEY, files.key)))
    roots = None if files.roots is None else read_bytes(_ROOT, files.roots, _LARGEST_FILE)
    _check_pair(files)
    if files.roots is not None:
        _trusting(_ROOT, files.roots)
    return grpc.ssl_server_certificate_configuration([(key, chain)], roots)


def _check_pair(files: CertificateFiles) -> None:
    """Present the certificate to a client in memory that trusts it: all that can be wrong shows there.

    Raises:
        SettingsError: the chain or the key can't be used, or they don't belong together, or the certificate
            is not valid now.
    """
    client = _trusting(_CERT, files.chain)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(files.chain, files.key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"{_KEY} {files.key} does not belong to {_CERT} {files.chain}"
        else:
            message = f"{_KEY} {files.key} is not a private key in PEM without a passphrase"
        raise SettingsError(f"{message} ({error.reason or error})") from error
    except OSError as error:
        raise SettingsError(f"{_KEY} {files.key}: {error.strerror or error}") from error
    try:
        valid_until = _handshake(client, server)
    except ssl.SSLCertVerificationError as error:
        raise SettingsError(f"{_CERT} {files.chain}: {error.verify_message}") from error
    logger.info("%s %s is valid until %s", _CERT, files.chain, valid_until)


def _trusting(flag: str, path: Path) -> ssl.SSLContext:
    """A client that trusts a file's certificates, be they roots or not.

    Raises:
        SettingsError: there is none in it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{flag} {path} holds no certificate in PEM ({error.reason or error})") from error
    except OSError as error:
        raise SettingsError(f"{flag} {path}: {error.strerror or error}") from error
    return context


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> str:
    """Connect both ends in memory; until when the server's certificate is valid.

    Raises:
        ssl.SSLCertVerificationError: the client refuses it.
    """
    upstream, downstream = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(downstream, upstream)
    ends = [asking, server.wrap_bio(upstream, downstream, server_side=True)]
    for _ in range(_MOST_ROUNDS):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return str((asking.getpeercert() or {}).get("notAfter"))
