"""What a graph will run on, as far as that decides how it is quantized."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from export.errors import ExportError
from export.session import CPU, usable_providers

if TYPE_CHECKING:
    from collections.abc import Mapping

Target = Literal["x86-vnni", "x86", "arm64", "cuda", "openvino"]
"""x86-64 processors that multiply and add bytes in one instruction (VNNI) and those that don't, 64-bit ARM,
TensorRT on a GPU, OpenVINO."""

ACCELERATORS: Mapping[Target, str] = {
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""onnxruntime's provider for a target that is no processor."""

X86, ARM64 = ("x86_64", "amd64"), ("aarch64", "arm64")
VNNI = {"avx512_vnni", "avx_vnni"}
CPUINFO = Path("/proc/cpuinfo")


def this_target() -> Target:
    """What graphs run on here: an accelerator that this onnxruntime can use, else the processor.

    Raises:
        ExportError: the processor is no known one.
    """
    return next((target for target in ACCELERATORS if is_here(target)), None) or processor_target()


def is_here(target: Target) -> bool:
    """Whether this machine can show how fast a graph is on the target."""
    if target in ACCELERATORS:
        return ACCELERATORS[target] in usable_providers()
    return target == _processor()


def processor_target() -> Target:
    """The target that this machine's processor is; x86 counts as without VNNI unless Linux says otherwise.

    Raises:
        ExportError: it is none.
    """
    if target := _processor():
        return target
    raise ExportError(
        f"processor {platform.machine().lower()!r} is no known target; name one with --target "
        f"{'|'.join(get_args(Target))}"
    )


def _processor() -> Target | None:
    machine = platform.machine().lower()
    if machine in ARM64:
        return "arm64"
    if machine in X86:
        return "x86-vnni" if VNNI.intersection(_cpuinfo().get("flags", "").split()) else "x86"
    return None


def provider(target: Target) -> str:
    """The execution provider to measure on: the target's, where this machine has it, else the CPU's."""
    wanted = ACCELERATORS.get(target, CPU)
    return wanted if wanted in usable_providers() else CPU


def processor() -> dict[str, str]:
    """Model and integer dot product instructions of this processor, as Linux reports them."""
    fields = _cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    dot_products = [flag for flag in flags if "vnni" in flag or flag in {"asimddp", "i8mm"}]
    return {
        "model": fields.get("model name", "unknown"),
        "dot_products": " ".join(dot_products) or "none",
    }


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first processor; empty elsewhere."""
    fields: dict[str, str] = {}
    for line in CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
