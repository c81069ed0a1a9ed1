"""Memory of a growing cache's rows: a run reads one half and writes the other, the next run the other way.

onnxruntime's own allocator keeps what it once took, and a cache that is longer with every run scatters it: 16
rows of GPT-2 that needed 870 MB took 1160, and kept them when the texts had ended.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

from serve.generate.cache_memory import reserve

if TYPE_CHECKING:
    from serve.generate.cache_tensors import CacheTensors


class TwoHalves:
    """Twice the addresses for all tensors of the cache; memory is resident where it was written.

    Attributes:
        rows: how many there is room for.
    """

    def __init__(self, cache: CacheTensors, rows: int, tokens: int) -> None:
        self.rows = rows
        self._cache = cache
        size = cache.dtype.itemsize
        pages = -(-math.prod(cache.shape(rows, tokens)) * size // mmap.PAGESIZE)
        self._part_bytes = pages * mmap.PAGESIZE
        self._halves = [reserve(len(cache.past) * self._part_bytes) for _ in range(2)]
        self._flat = [np.frombuffer(half, cache.dtype) for half in self._halves]

    def values(self, half: int, rows: int, tokens: int) -> list[Any]:
        """OrtValues of so many rows and tokens, one per tensor of the cache, over one of the halves."""
        shape = self._cache.shape(rows, tokens)
        count = math.prod(shape)
        flat = self._flat[half]
        step = self._part_bytes // flat.itemsize
        starts = range(0, len(flat), step)
        return [OrtValue.ortvalue_from_numpy(flat[start : start + count].reshape(shape)) for start in starts]

    def trim(self, rows: int, tokens: int) -> None:
        """Give back what lies behind so many rows and tokens."""
        used = math.prod(self._cache.shape(rows, tokens)) * self._cache.dtype.itemsize
        kept = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
        if kept < self._part_bytes:
            for half in self._halves:
                for start in range(0, len(half), self._part_bytes):
                    half.madvise(mmap.MADV_DONTNEED, start + kept, self._part_bytes - kept)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What several slots hold, in one tensor per layer and part.

    Attributes:
        memory: that of the tensors, used by no other rows.
        half: the half that they lie in; the other one is free.
        values: OrtValues [rows, heads, tokens, head size], or [2, rows, heads, tokens, head size].
        slots: of each row.
        padding: for each row, how many tokens come before its own.
        tokens: the tensors' length.
    """

    memory: TwoHalves
    half: int
    values: list[Any]
    slots: list[int]
    padding: list[int]
    tokens: int

    def length(self, row: int) -> int:
        """Tokens of a row without its padding."""
        return self.tokens - self.padding[row]
