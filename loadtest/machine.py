"""What a run's figures depend on beside the server: this machine and the versions of what measures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("grpcio", "protobuf", "numpy", "hdrhistogram", "locust", "onnxruntime")


def describe_machine() -> dict[str, str]:
    """The processor, its cores, the memory and the system of the machine that sends the load."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _field("/proc/cpuinfo", ("model name", "Model", "Hardware")) or platform.machine(),
        "cores": str(usable),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Python's, and those of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _memory() -> str:
    kilobytes = _field("/proc/meminfo", ("MemTotal",)).removesuffix(" kB")
    return f"{int(kilobytes) / 2**20:.1f} GiB" if kilobytes.isdigit() else ""


def _field(path: str, names: tuple[str, ...]) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    fields = dict(
        reversed([(key.strip(), value.strip()) for key, _, value in (li.partition(":") for li in lines)])
    )
    return next((fields[name] for name in names if fields.get(name)), "")
