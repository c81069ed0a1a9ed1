"""The Linux control groups that this process is in, where limits of CPU time and memory stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
"""Which cgroups the process is in, one line `hierarchy:controllers:path` each."""


def cgroup_folders(controller: str, mount: Path = MOUNT, own: Path = OWN) -> Iterator[tuple[int, Path]]:
    """The folders that may limit this process, and of which version of cgroups (1 or 2) each is.

    Every cgroup from the process's own up to the root may set a limit, the least one counts. A service of
    systemd sees its own some levels down; a container that sees its own alone finds it at the mount itself.

    Args:
        controller: of version 1, such as `cpu` or `memory`; version 2 has all in one folder.
        mount: where the cgroups are mounted.
        own: which of them the process is in.
    """
    try:
        memberships = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        memberships = [["0", "", "/"]]
    for _, controllers, path in (parts for parts in memberships if len(parts) == len("0::")):
        if not controllers:
            for folder in _up(path, mount, mount / "unified"):
                yield 2, folder
        elif controller in controllers.split(","):
            for folder in _up(path, mount / controllers, mount / controller):
                yield 1, folder


def _up(path: str, *mounts: Path) -> Iterator[Path]:
    for mount in mounts:
        folder = mount / path.lstrip("/")
        while folder != mount:
            yield folder
            folder = folder.parent
        yield mount
