"""How many cores this process may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from serve.cgroups import MOUNT, OWN, cgroup_folders

if TYPE_CHECKING:
    from pathlib import Path

_QUOTA_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}


def usable_cores(cgroup: Path = MOUNT, own: Path = OWN) -> int:
    """Cores that this process may use: its CPU affinity, cut to what its cgroups grant; at least 1.

    Of a quota of 1.5 cores 1 is taken: two threads would be throttled half of the time.

    Args:
        cgroup: where the cgroups are mounted.
        own: which of them the process is in, one line `hierarchy:controllers:path` each.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(folder, _QUOTA_FILES[version]) for version, folder in cgroup_folders("cpu", cgroup, own)]
    return max(1, min([cores, *(quota for quota in quotas if quota is not None)]))


def _quota(folder: Path, files: tuple[str, ...]) -> int | None:
    """Whole cores that a cgroup grants; None where it sets no limit."""
    try:
        quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
    except (OSError, ValueError):
        return None
    # No limit is "max" in version 2 and -1 in version 1.
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) // int(period)
