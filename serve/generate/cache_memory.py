"""Memory for keys and values: there in full for the graph, taken from the machine only where it is used."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Python 3.11 doesn't name it. Without it Linux counts the whole area as if it were in use.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


def reserve(size: int) -> mmap.mmap:
    """Bytes that read as zeros, and take no memory until they are written to.

    Raises:
        ModelLoadError: the machine, or a limit on this process, doesn't have so many addresses.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, OverflowError, ValueError) as error:
        raise ModelLoadError(
            f"can't reserve {size} bytes of addresses for keys and values: {error}; lower context_length or "
            "max_num_seqs in config.pbtxt"
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        # A huge page would make 2 MB resident for a head's first token.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class CacheMemory:
    """Tensors of one shape whose first dimension is the slot.

    Pages become resident when they are first written to, and are given back when their slot is released.

    Attributes:
        tensors: each [slots, ...], zero where nothing was written.

    Raises:
        ModelLoadError: see `reserve`.
    """

    def __init__(self, count: int, shape: Sequence[int], dtype: np.dtype) -> None:
        self._slot_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._tensor_bytes = shape[0] * self._slot_bytes
        self._memory = reserve(count * self._tensor_bytes)
        flat = np.frombuffer(self._memory, dtype)
        self.tensors = list(flat.reshape(count, *shape))

    def close(self) -> None:
        """Give all of it back, as soon as nobody looks at it any more."""
        self.tensors.clear()
        with contextlib.suppress(BufferError):  # a view is alive, and its end is the memory's
            self._memory.close()

    def release(self, slot: int) -> None:
        """Give a slot's memory back: it reads as zeros then."""
        for start, end in self._pages(slot):
            if end > start:
                self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def resident_bytes(self, slot: int) -> int:
        """How much of a slot's memory is really there, to a page."""
        address = self.tensors[0].ctypes.data
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        resident = 0
        for start, end in self._pages(slot):
            pages = ctypes.create_string_buffer(max(end - start, 0) // mmap.PAGESIZE)
            if len(pages) and mincore(address + start, end - start, pages):
                raise OSError(ctypes.get_errno(), "mincore")
            resident += sum(page & 1 for page in pages.raw) * mmap.PAGESIZE
        return resident

    def expected_bytes(self, heads: int, tokens: int) -> int:
        """At most how much of a slot is there after so many tokens, to a page for each head."""
        written = tokens * self.tensors[0].shape[-1] * self.tensors[0].itemsize
        pages = -(-written // mmap.PAGESIZE) + 1
        return len(self.tensors) * heads * int(pages) * mmap.PAGESIZE

    def _pages(self, slot: int) -> list[tuple[int, int]]:
        """Begin and end of a slot's memory in each tensor, in whole pages that it shares with no other."""
        starts = range(slot * self._slot_bytes, len(self.tensors) * self._tensor_bytes, self._tensor_bytes)
        page = mmap.PAGESIZE
        return [(-(-start // page) * page, (start + self._slot_bytes) // page * page) for start in starts]
