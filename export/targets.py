"""What a graph will run on, as far as that decides how it is quantized."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal, get_args

from export.errors import ExportError

Target = Literal["x86-vnni", "x86", "arm64", "cuda", "openvino"]
"""x86-64 processors that multiply and add bytes in one instruction (VNNI) and those that don't, 64-bit ARM,
TensorRT on a GPU, OpenVINO."""

X86, ARM64 = ("x86_64", "amd64"), ("aarch64", "arm64")
VNNI = {"avx512_vnni", "avx_vnni"}
CPUINFO = Path("/proc/cpuinfo")


def this_target() -> Target:
    """The target that this machine's processor is; x86 counts as without VNNI unless Linux says otherwise.

    Raises:
        ExportError: it is none.
    """
    machine = platform.machine().lower()
    if machine in ARM64:
        return "arm64"
    if machine in X86:
        return "x86-vnni" if VNNI.intersection(_processor_flags()) else "x86"
    raise ExportError(
        f"processor {machine!r} is no known target; name one with --target {'|'.join(get_args(Target))}"
    )


def _processor_flags() -> list[str]:
    if not CPUINFO.exists():
        return []
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return value.split()
    return []
