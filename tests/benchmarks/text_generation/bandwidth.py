"""How fast memory can be read: what bounds the decoding of one text."""

from __future__ import annotations

import threading
import time

import numpy as np

# Far more than the last-level cache of any processor.
MAIN_MEMORY_BYTES = 1 << 30


def read_bandwidth(buffer: np.ndarray, threads: int, times: int = 1) -> float:
    """Bytes per second at which threads read a buffer FP64 [n], each a part of its own, `times` times.

    The product of an array with itself reads it once and is the fastest such pass that numpy has: one thread
    gets 37 GB/s of it where a sum gets 34, two get 50 and 46 (AMD Zen 5 virtual machine).
    """
    barrier = threading.Barrier(threads)
    spans: list[tuple[float, float]] = []

    def read(part: np.ndarray) -> None:
        barrier.wait()
        start = time.perf_counter()
        for _ in range(times):
            np.dot(part, part)
        spans.append((start, time.perf_counter()))

    readers = [threading.Thread(target=read, args=(part,)) for part in np.array_split(buffer, threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return buffer.nbytes * times / (max(end for _, end in spans) - min(start for start, _ in spans))


def ones(size: int) -> np.ndarray:
    """FP64 of so many bytes, each page of which is there."""
    return np.ones(size // 8)
