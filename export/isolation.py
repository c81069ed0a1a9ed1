"""Work on a graph in a process of its own.

A graph from elsewhere can loop for ever in onnxruntime, or end the process (35 hangs and 4 aborts in 60 000
mutated graphs), and resident memory can only be told in a process that does nothing else.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]


def run_isolated(module: str, arguments: Sequence[str], seconds: float, inherited: Sequence[int] = ()) -> str:
    """Run a module of this package as a program.

    Args:
        module: its name, such as "export.memory".
        arguments: its command line.
        seconds: of wall clock that it may take.
        inherited: descriptors of open files that it gets, by the same numbers.

    Returns:
        What it wrote to standard output.

    Raises:
        ExportError: it failed, with the last line of its standard error, or was too slow, or was ended.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, a module of this package
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=seconds,
            pass_fds=inherited,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"onnxruntime was not done with the graph after {seconds:.0f} s") from None
    if done.returncode < 0:
        raise ExportError(f"the graph ended its process by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ExportError(lines[-1] if lines else f"{module} exited with {done.returncode}")
    return done.stdout


def limit_memory() -> None:
    """Let this process have the machine's memory at most, so that a graph gone wild fails alone."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
