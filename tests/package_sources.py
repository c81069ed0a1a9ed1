"""Gets programs from the machine's own package sources into a folder of their own, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_INSTALL_SECONDS = 120


class UnavailableError(Exception):
    """A tool can't be had on this machine; the message says why."""


def installed(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled when it isn't there: whole or not at all, whoever else does the same.

    Raises:
        UnavailableError: what it takes can't be had.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        fill(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # nobody else was faster
                raise
    return folder


def pip_install(folder: Path, *requirements: str) -> None:
    """Wheels into a folder, without what they depend on.

    Raises:
        UnavailableError: there are none for this machine, or no way to them.
    """
    _command(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-input",
            "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15", "--target", str(folder),
            *requirements,
        ],
        folder,
    )  # fmt: skip


def unpack_debian_package(folder: Path, package: str) -> None:
    """Download a package of this machine's Debian and unpack it, without installing it.

    Raises:
        UnavailableError: this is no Debian, or it hasn't the package.
    """
    try:
        _command(["apt-get", "--quiet", "download", package], folder)
    except UnavailableError:
        # Images come without the lists of packages; ours are in a folder of our own, as is all the rest.
        (folder / "lists" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
        _command(["apt-get", "--quiet", *private, "update"], folder)
        _command(["apt-get", "--quiet", *private, "download", package], folder)
        for made in ("lists", "cache"):
            shutil.rmtree(folder / made, ignore_errors=True)
    for archive in folder.glob("*.deb"):
        _command(["dpkg", "-x", str(archive), str(folder)], folder)


def _command(command: list[str], folder: Path) -> None:
    # C: the reason is read by who reads the tests' output.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
            timeout=_INSTALL_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(str(error)) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise UnavailableError(f"{' '.join(command[:4])} ...: {said[-1]}")
