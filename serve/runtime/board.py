"""Which board and which processor this is, and whether that multiplies bytes in one instruction."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# The first is a link to the second, and is not there in some containers.
_DEVICE_TREES = (Path("/proc/device-tree/model"), Path("/sys/firmware/devicetree/base/model"))

# Linux numbers Arm's cores and doesn't name them; these are on boards and in clouds.
_ARM = "0x41"
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
}
# Instructions that int8 graphs gain from: sums of products of bytes, and of small matrices of them.
_DOT_PRODUCTS = ("asimddp", "i8mm", "avx_vnni", "avx512_vnni", "amx_int8")


@dataclass(frozen=True, slots=True)
class Board:
    """What Linux says of the machine; empty where it doesn't.

    Attributes:
        name: of the board, such as `Raspberry Pi 5 Model B Rev 1.0`; servers and PCs have none.
        cores: of the processor, such as `4 × Cortex-A76`.
        dot_products: Linux's names of its instructions that sum products of bytes.
    """

    name: str
    cores: str
    dot_products: tuple[str, ...]


def find_board(cpuinfo: Path = _CPUINFO, device_trees: tuple[Path, ...] = _DEVICE_TREES) -> Board:
    """The machine that this process runs on.

    Args:
        cpuinfo: Linux's description of the processors, a block for each.
        device_trees: files of which one may have the board's name.
    """
    processors = _processors(cpuinfo)
    counts = Counter(name for processor in processors if (name := _core(processor)))
    flags = {flag for processor in processors for flag in _flags(processor)}
    return Board(
        name=_name(device_trees),
        cores=", ".join(f"{count} × {name}" for name, count in counts.items()),
        dot_products=tuple(flag for flag in _DOT_PRODUCTS if flag in flags),
    )


def _name(device_trees: tuple[Path, ...]) -> str:
    for path in device_trees:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return path.read_text(encoding="utf-8").rstrip("\0\n")
    return ""


def _processors(cpuinfo: Path) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo that describe a processor; Raspberry Pi OS adds one of the board."""
    blocks: list[dict[str, str]] = []
    with contextlib.suppress(OSError):
        for block in cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            pairs = (line.partition(":") for line in block.splitlines())
            blocks.append({name.strip(): value.strip() for name, _, value in pairs})
    return [block for block in blocks if "processor" in block]


def _core(processor: dict[str, str]) -> str:
    implementer, part = processor.get("CPU implementer", ""), processor.get("CPU part", "")
    if implementer == _ARM and part in _ARM_PARTS:
        return _ARM_PARTS[part]
    if part:
        return f"core {part} of implementer {implementer}"
    return processor.get("model name", "")


def _flags(processor: dict[str, str]) -> list[str]:
    return processor.get("flags", processor.get("Features", "")).split()
