"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: its CPU affinity, cut to what its cgroups grant; at least 1.

    Every cgroup from the process's own up to the root may set a quota, the least one counts; both versions of
    cgroups are read. Of a quota of 1.5 cores 1 is taken: two threads would be throttled half of the time.

    Args:
        cgroup: where the cgroups are mounted.
        own: which of them the process is in, one line `hierarchy:controllers:path` each.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas(cgroup, own)]))


def _quotas(cgroup: Path, own: Path) -> Iterator[int]:
    """Whole cores that each of the process's cgroups grants, where it sets a limit."""
    try:
        memberships = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        memberships = [["0", "", "/"]]
    files: tuple[str, ...]
    for _, controllers, path in (parts for parts in memberships if len(parts) == len("0::")):
        if not controllers:
            mounts, files = (cgroup, cgroup / "unified"), ("cpu.max",)
        elif "cpu" in controllers.split(","):
            mounts, files = (cgroup / controllers, cgroup / "cpu"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        for folder in _folders(mounts, path):
            quota = _quota(folder, files)
            if quota is not None:
                yield quota


def _folders(mounts: tuple[Path, ...], path: str) -> Iterator[Path]:
    """The cgroup and those above it; in a container that sees its own alone only the mount itself exists."""
    for mount in mounts:
        folder = mount / path.lstrip("/")
        while folder != mount:
            yield folder
            folder = folder.parent
        yield mount


def _quota(folder: Path, files: tuple[str, ...]) -> int | None:
    try:
        quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
    except (OSError, ValueError):
        return None
    # No limit is "max" in version 2 and -1 in version 1.
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) // int(period)
