"""Resident memory of a served graph, measured in a process that does nothing else."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from export.errors import ExportError
from export.isolation import run_isolated
from export.session import Session, cycle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECONDS = 120.0
RUNS = 5


def resident_bytes(graph: bytes | Path, rows: Mapping[str, np.ndarray]) -> int | None:
    """As `grown_bytes`; None also where the measurement fails or takes minutes: it is only a figure."""
    try:
        return grown_bytes(graph, rows)
    except (ExportError, OSError, ValueError):
        return None


def grown_bytes(graph: bytes | Path, rows: Mapping[str, np.ndarray]) -> int | None:
    """By how much a process grows that loads the graph and runs it, one thread, on the CPU's provider.

    The difference of the resident set between "onnxruntime is imported" and "the graph has run five times",
    freed memory given back to the system both times. What onnxruntime needs for its first session is among
    it, mostly pages of its own code: 10 MB for a graph of one node, with onnxruntime 1.31 on x86-64.

    Args:
        graph: the content of an `.onnx` file, or its path; with external data it has to be the path.
        rows: input name to array; the first row is run, or as many as the graph's fixed batch has. A graph
            with an input without a batch axis gets them as they are.

    Returns:
        Bytes; None where the system isn't Linux.

    Raises:
        ExportError: the graph can't be loaded or run, or takes minutes.
    """
    if sys.platform != "linux":
        return None
    with _file_in_memory("rows") as arrays, _file_in_memory("graph") as content:
        # Python strings would need pickle; numpy's own are read without.
        np.savez(arrays, allow_pickle=False, **{f"input.{name}": _storable(a) for name, a in rows.items()})
        if isinstance(graph, bytes):
            content.write(graph)
        arrays.flush()
        content.flush()
        path = f"/proc/self/fd/{content.fileno()}" if isinstance(graph, bytes) else str(graph)
        paths = (path, f"/proc/self/fd/{arrays.fileno()}")
        inherited = (content.fileno(), arrays.fileno())
        return int(run_isolated("export.memory", paths, SECONDS, inherited))


def _file_in_memory(name: str) -> BinaryIO:
    """A file without a place on the disk: however this process ends, nothing stays behind."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _storable(array: np.ndarray) -> np.ndarray:
    return array.astype(np.str_) if array.dtype == object else array


def _resident() -> int:
    """Bytes of this process in memory, after what is free went back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _grow(graph: Path, arrays: Path) -> int:
    with np.load(arrays, allow_pickle=False) as stored:
        rows = {name.removeprefix("input."): stored[name] for name in stored.files}
    rows = {name: array.astype(object) if array.dtype.kind == "U" else array for name, array in rows.items()}
    before = _resident()
    session = Session(graph)
    if session.batch_size:
        rows = cycle(rows, session.batch_size)
    elif all(shape and not isinstance(shape[0], int) for shape in session.input_shapes.values()):
        rows = {name: array[:1] for name, array in rows.items()}
    for _ in range(RUNS):
        session.run(rows)
    return _resident() - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a child: print how many bytes this process grew by."""
    parser = argparse.ArgumentParser(prog="python -m export.memory")
    parser.add_argument("graph", type=Path)
    parser.add_argument("rows", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(_grow(options.graph, options.rows))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
