"""Certificate authorities and what they issue, made with the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_CONFIG = """
[ca]
default_ca = issue
[issue]
database = {folder}/index
new_certs_dir = {folder}
certificate = {folder}/ca.pem
private_key = {folder}/ca.key
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""


@dataclass
class Pair:
    """A certificate and its key, both files in PEM."""

    certificate: Path
    key: Path


def openssl(*words: str | Path) -> None:
    command = ["openssl", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Authority:
    """A root that signs certificates for localhost."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.root = folder / "ca.pem"
        (folder / "index").touch()
        (folder / "config").write_text(_CONFIG.format(folder=folder))
        subject = ("-subj", f"/CN={folder.name}", "-days", "2")
        openssl("req", "-x509", *_NEW_KEY, "-keyout", folder / "ca.key", "-out", self.root, *subject)

    def issue(self, name: str, *, starts: float = -3600, ends: float = 3600, host: str = "localhost") -> Pair:
        """A certificate that is valid from and until so many seconds from now."""
        certificate, key, request = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        names = ("-addext", f"subjectAltName=DNS:{host},IP:127.0.0.1")
        openssl("req", "-new", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}", *names)
        now = datetime.now(UTC)
        start, end = (f"{now + timedelta(seconds=seconds):%Y%m%d%H%M%SZ}" for seconds in (starts, ends))
        config = ("-batch", "-notext", "-config", self.folder / "config")
        openssl("ca", *config, "-startdate", start, "-enddate", end, "-in", request, "-out", certificate)
        return Pair(certificate, key)
