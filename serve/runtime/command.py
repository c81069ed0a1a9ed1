"""`onnxedge providers`: what this device is, and what it can run graphs on."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import distributions
from typing import TYPE_CHECKING

import onnxruntime as ort

from serve.admission import memory_limit
from serve.pb import model_config_pb2 as pb
from serve.runtime.backend_config import session_settings
from serve.runtime.board import find_board
from serve.runtime.cores import usable_cores
from serve.runtime.providers import CPU, DEFAULT_ORDER, find_providers, short_name

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each brings the module `onnxruntime`, and pip lets them overwrite each other.
_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)


def main(arguments: Sequence[str]) -> int:
    """Print the device, its providers, and what a model without a wish gets; the exit status."""
    parser = argparse.ArgumentParser(
        prog="onnxedge providers", description="What this device is, and what it can run graphs on."
    )
    parser.parse_args(arguments)
    cores = usable_cores()
    print(f"onnxruntime {ort.__version__}, {platform.machine()}, {cores} usable cores")
    print_packages()
    print_device()
    print_providers()
    settings = session_settings(pb.ModelConfig(), {}, cores)
    print(f"A model without a wish runs on: {', '.join((*(a.name for a in settings.accelerators), CPU))}")
    print(f"Its runs at once: {settings.instances}; threads of each: {settings.intra_op_threads}")
    return 0


def print_packages() -> None:
    """A warning where several packages of onnxruntime are installed: all of them write the same files."""
    found = sorted({d.name for d in distributions() if d.name and d.name.replace("_", "-") in _PACKAGES})
    if len(found) > 1:
        keep = next(name for name in found if name != "onnxruntime")
        print(
            f"Installed over each other: {', '.join(found)}. Keep one of them, for example\n"
            f"  pip uninstall --yes {' '.join(found)}; pip install --no-deps {keep}"
        )


def print_device() -> None:
    """The board, its processor and the memory; a line for each that Linux tells of."""
    board = find_board()
    if board.name:
        print(f"Board: {board.name}")
    if board.cores:
        products = ", ".join(board.dot_products) or "none"
        print(f"Processor: {board.cores}; dot products of bytes: {products}")
    if memory := memory_limit():
        print(f"Memory that the server may use: {memory >> 20} MiB")


def print_providers() -> None:
    """Each provider of this onnxruntime, and whether it works here."""
    states = find_providers()
    for state in states:
        usable = f"not usable: {state.problem}" if state.problem else "usable"
        print(f"  {short_name(state.name):<15} {state.name:<28} {usable}")
    absent = {*ort.get_all_providers()} - {state.name for state in states}
    print(f"Not in this onnxruntime: {', '.join(sorted(short_name(name) for name in absent))}")
    print(f"Default order: {', '.join(short_name(name) for name in (*DEFAULT_ORDER, CPU))}")
