"""What `onnxedge providers` says of the device, from what the kernels of boards write into /proc."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serve.runtime import board, command
from serve.runtime.board import Board, find_board

if TYPE_CHECKING:
    from pathlib import Path

# Of the cores: Linux on a Raspberry Pi 4 and 5, and on an RK3588, where two kinds of cores share the work.
PI_4 = (
    "BogoMIPS : 108.00\nFeatures : fp asimd evtstrm crc32 cpuid\nCPU implementer : 0x41\nCPU part : 0xd08\n"
)
PI_5 = PI_4.replace("cpuid", "cpuid asimdrdm lrcpc dcpop asimddp").replace("0xd08", "0xd0b")
A55 = PI_5.replace("0xd0b", "0xd05")
UNKNOWN = PI_5.replace("0x41", "0x61").replace("0xd0b", "0x022").replace("asimddp", "asimddp i8mm")
X86 = "model name : AMD EPYC\nflags : fpu avx2 avx512_vnni avx_vnni amx_int8\n"
# Raspberry Pi OS has a last block of the board.
BOARD = "Hardware : BCM2835\nRevision : c03111\nModel : Raspberry Pi 4 Model B Rev 1.1\n"


def cpuinfo(*processors: str, last: str = "") -> str:
    blocks = [f"processor : {number}\n{text}" for number, text in enumerate(processors)]
    return "\n".join((*blocks, last))


@pytest.mark.parametrize(
    ("text", "cores", "dot_products"),
    [
        (cpuinfo(*[PI_4] * 4, last=BOARD), "4 × Cortex-A72", ()),
        (cpuinfo(*[PI_5] * 4), "4 × Cortex-A76", ("asimddp",)),
        (cpuinfo(*[A55] * 4, *[PI_5] * 4), "4 × Cortex-A55, 4 × Cortex-A76", ("asimddp",)),
        (cpuinfo(UNKNOWN), "1 × core 0x022 of implementer 0x61", ("asimddp", "i8mm")),
        (cpuinfo(X86, X86), "2 × AMD EPYC", ("avx_vnni", "avx512_vnni", "amx_int8")),
        (cpuinfo("isa : rv64imafdc\n"), "", ()),
        ("", "", ()),
    ],
)
def test_cores_have_names_and_dot_products(
    tmp_path: Path, text: str, cores: str, dot_products: tuple[str, ...]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert find_board(tmp_path / "cpuinfo", ()) == Board("", cores, dot_products)


def test_the_device_tree_names_the_board(tmp_path: Path) -> None:
    """Its string ends in a zero byte, as C's do; the first file that is there counts."""
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    files = (tmp_path / "none", tmp_path / "model")
    assert find_board(tmp_path / "none", files).name == "Raspberry Pi 5 Model B Rev 1.0"


def test_where_linux_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"\xff\xfe")
    assert find_board(tmp_path / "none", (tmp_path / "model",)) == Board("", "", ())


def test_the_command_tells_the_board_and_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo(*[PI_5] * 4))
    (tmp_path / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    found = find_board(tmp_path / "cpuinfo", (tmp_path / "model",))
    monkeypatch.setattr(command, "find_board", lambda: found)
    monkeypatch.setattr(command, "usable_cores", lambda: 4)
    monkeypatch.setattr(command, "memory_limit", lambda: 8 << 30)
    assert command.main([]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("4 usable cores")
    assert told[1:4] == [
        "Board: Raspberry Pi 5 Model B Rev 1.0",
        "Processor: 4 × Cortex-A76; dot products of bytes: asimddp",
        "Memory that the server may use: 8192 MiB",
    ]
    assert told[-1] == "Its runs at once: 2; threads of each: 2"
    monkeypatch.setattr(command, "find_board", lambda: board.Board("", "", ()))
    monkeypatch.setattr(command, "memory_limit", lambda: 0)
    assert command.main([]) == 0
    assert "Board" not in capsys.readouterr().out


class _Installed:
    def __init__(self, name: str) -> None:
        self.name = name


def test_two_packages_of_onnxruntime_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip installs both, and which of them `import onnxruntime` finds depends on who came last."""
    names = ["numpy", "onnxruntime_gpu", "onnxruntime"]
    monkeypatch.setattr(command, "distributions", lambda: [_Installed(name) for name in names])
    command.print_packages()
    assert capsys.readouterr().out == (
        "Installed over each other: onnxruntime, onnxruntime_gpu. Keep one of them, for example\n"
        "  pip uninstall --yes onnxruntime onnxruntime_gpu; pip install --no-deps onnxruntime_gpu\n"
    )
    names.remove("onnxruntime_gpu")
    command.print_packages()
    assert capsys.readouterr().out == ""
