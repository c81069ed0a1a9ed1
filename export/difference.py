"""How far one graph's output is from another's, for any type of output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    """Compare two arrays of one shape. Infinities and NaN equal their like, and are else infinitely off."""
    numeric = all(array.dtype.kind in "iuf" for array in (found, original))
    same = (found == original) if not numeric else _same(found, original)
    equal = float(np.mean(same)) if found.size else 1.0
    if not numeric or not found.size:
        return OutputDifference(equal=equal, relative=1.0 - equal)
    first, second = found.astype(np.float64), original.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(first - second))
    off[np.isnan(off)] = np.inf
    finite = np.isfinite(first) & np.isfinite(second)
    largest = float(np.abs(second[finite]).max(initial=0.0))
    return OutputDifference(
        equal=equal,
        relative=float(off.max()) / max(largest, float(np.finfo(np.float32).tiny)),
        max_abs=float(off.max()),
        mean_abs=float(off.mean()),
        cosine=_cosine(first[finite], second[finite]),
        top1=_top1(found, original),
    )


def _same(found: np.ndarray, original: np.ndarray) -> np.ndarray:
    neither = (found != found) & (original != original)  # noqa: PLR0124 - NaN
    same: np.ndarray = (found == original) | neither
    return same


def _cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.dot(first, second)) / norms if norms else None


def _top1(found: np.ndarray, original: np.ndarray) -> float | None:
    is_rows_of_scores = original.ndim == 2 and original.shape[1] > 1  # noqa: PLR2004 - axes: rows, classes
    if original.dtype.kind != "f" or not is_rows_of_scores:
        return None
    return float(np.mean(found.argmax(axis=1) == original.argmax(axis=1)))
