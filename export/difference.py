"""How far one graph's output is from another's, for any type of output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 20


@dataclass(frozen=True)
class OutputDifference:
    """Of all numbers of an output.

    Attributes:
        equal: share of them that are the same.
        relative: largest absolute difference by the original's largest absolute value; for text and truth
            values the share that isn't the same.
        max_abs: largest absolute difference; None for text and truth values.
        mean_abs: mean absolute difference, likewise.
        cosine: of the two as vectors of all their numbers, likewise; None also where one has zeros only.
        top1: share of rows whose largest number is in the same place; None for other than rows of floats.
    """

    equal: float
    relative: float
    max_abs: float | None = None
    mean_abs: float | None = None
    cosine: float | None = None
    top1: float | None = None


def output_difference(found: np.ndarray, original: np.ndarray) -> OutputDifference:
    """Compare two arrays of one shape. Infinities and NaN equal themselves, and are else infinitely off."""
    if any(array.dtype.kind not in "iuf" for array in (found, original)) or not found.size:
        equal = float(np.mean(found == original)) if found.size else 1.0
        return OutputDifference(equal=equal, relative=1.0 - equal)
    sums = _Sums()
    first, second = found.reshape(-1), original.reshape(-1)
    for start in range(
        0, found.size, CHUNK
    ):  # the logits of a language model would fill the memory as floats
        sums.add(first[start : start + CHUNK], second[start : start + CHUNK])
    norms = math.sqrt(sums.squares[0]) * math.sqrt(sums.squares[1])
    return OutputDifference(
        equal=sums.equal / found.size,
        relative=sums.largest_off / max(sums.largest, float(np.finfo(np.float32).tiny)),
        max_abs=sums.largest_off,
        mean_abs=sums.off / found.size,
        cosine=sums.product / norms if norms else None,
        top1=_top1(found, original),
    )


class _Sums:
    """What a difference is made of, added up."""

    def __init__(self) -> None:
        self.equal = 0
        self.off = self.largest_off = self.largest = self.product = 0.0
        self.squares = (0.0, 0.0)

    def add(self, found: np.ndarray, original: np.ndarray) -> None:
        """Take in two vectors."""
        same = (found == original) | ((found != found) & (original != original))  # noqa: PLR0124 - NaN
        first, second = found.astype(np.float64), original.astype(np.float64)
        with np.errstate(invalid="ignore"):
            off = np.where(same, 0.0, np.abs(first - second))
        off[np.isnan(off)] = np.inf
        finite = np.isfinite(first) & np.isfinite(second)
        first, second = first[finite], second[finite]
        self.equal += int(same.sum())
        self.off += float(off.sum())
        self.largest_off = max(self.largest_off, float(off.max()))
        self.largest = max(self.largest, float(np.abs(second).max(initial=0.0)))
        self.product += float(np.dot(first, second))
        self.squares = (
            self.squares[0] + float(np.dot(first, first)),
            self.squares[1] + float(np.dot(second, second)),
        )


def _top1(found: np.ndarray, original: np.ndarray) -> float | None:
    is_rows_of_scores = original.ndim == 2 and original.shape[1] > 1  # noqa: PLR2004 - axes: rows, classes
    if original.dtype.kind != "f" or not is_rows_of_scores:
        return None
    return float(np.mean(found.argmax(axis=1) == original.argmax(axis=1)))
