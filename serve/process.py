"""Settings of the process that must be made before grpc and onnxruntime are imported."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 64 << 20
_GLIBC_TRIM_THRESHOLD = 128 << 10

# Python's own is 5 ms.
_SWITCH_SECONDS = 0.001

_lock = threading.Lock()
_keeping_large_blocks = False
_returning = 0


def keep_large_blocks() -> bool:
    """Have glibc's allocator keep blocks of up to 64 MiB instead of asking the kernel for each one.

    Image tensors (600 KB) are over its default threshold of 128 KB, so every message would cost an mmap, its
    page faults and a munmap: 428 → 1371 requests/s with both settings, for 5 MiB of memory.

    Returns:
        whether it was done; False on an allocator that has no mallopt (musl, macOS).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    global _keeping_large_blocks  # noqa: PLW0603 - the allocator's settings are the process's
    _keeping_large_blocks = bool(
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)
    )
    return _keeping_large_blocks


def quiet_grpc() -> None:
    """Keep gRPC's own log, which is not the server's, off stderr; the environment may ask for it.

    It complains of each stop, that it can't accept connections any more.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def take_short_turns() -> None:
    """Have threads that work in Python give way to each other after 1 ms.

    A run's answers, and the next run, wait for the interpreter's lock behind whichever thread decodes. With
    32 clients of an LSTM that shares runs, p99 was 18 ms with this and 23 ms without, at the same rate.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """Give what is freed inside the block back to the system, what only cycles of objects hold included.

    `keep_large_blocks` has glibc keep 64 MiB at the end of the heap of each thread that loaded a graph, and
    malloc_trim alone doesn't cut those: with 200 reloads on gRPC's threads 127 MiB were resident instead of
    99. Meanwhile glibc's own threshold holds, so requests with large tensors pay page faults.
    """
    global _returning  # noqa: PLW0603 - the allocator's settings are the process's
    libc = ctypes.CDLL(None)
    trim = getattr(libc, "malloc_trim", None)  # musl and macOS have none
    with _lock:
        _returning += 1
        if _keeping_large_blocks:
            libc.mallopt(_M_TRIM_THRESHOLD, _GLIBC_TRIM_THRESHOLD)
    try:
        yield
        gc.collect()
        if trim is not None:
            trim(0)
    finally:
        with _lock:
            _returning -= 1
            if _keeping_large_blocks and not _returning:
                libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)


def return_freed_memory() -> None:
    """Give memory that is free already back to the system, that of this thread's heap above all."""
    with returning_memory():
        # glibc cuts the end of a heap when a large block of it is freed, and never otherwise.
        bytearray(_GLIBC_TRIM_THRESHOLD)


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system doesn't say (no /proc)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except OSError:
        return 0
