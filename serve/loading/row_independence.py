"""Whether the rows of a batch are answered as if each had come alone.

A graph that quantizes activations by the range of the whole tensor answers a row differently beside others:
batched by a server, one client's answer would depend on another's request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from serve.loading.checksums import read_report
from serve.loading.graph_file import read_graph_file
from serve.runtime.providers import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Arrays = Mapping[str, np.ndarray]

# Of an output's largest number. Kernels that add up in another order for another batch differ by 1e-6.
APART = 1e-4
# Half precision, in the graph or chosen by an accelerator, rounds at 5e-4.
APART_IN_HALF = 5e-3


def is_declared_independent(version_folder: Path, filename: str) -> bool:
    """What is known of a graph without running it: its exporter's word, or else its operators.

    The exporter's is `rows_independent` of the variant with this file in report.json. It may allow operators
    that mix rows in general: where their ranges were bound to constants, they don't.

    Raises:
        ModelLoadError: the report or the graph can't be read.
    """
    declared = _declared(read_report(version_folder) or {}, filename)
    if declared is not None:
        return declared
    return not read_graph_file(version_folder / filename).quantizes_dynamically


def _declared(report: Mapping[str, Any], filename: str) -> bool | None:
    variants = report.get("variants")
    for variant in variants.values() if isinstance(variants, dict) else ():
        if isinstance(variant, dict) and variant.get("file") == filename:
            independent = variant.get("rows_independent")
            return independent if isinstance(independent, bool) else None
    return None


def are_apart(
    together: Sequence[np.ndarray], alone: Sequence[Sequence[np.ndarray]], providers: Sequence[str]
) -> str:
    """What shows that rows depend on each other, or "". Rows that are all alike show nothing.

    Args:
        together: each output of a run of several rows.
        alone: for each of the rows, each output of its own run.
        providers: those that ran it.
    """
    for index, batched in enumerate(together):
        single = [outputs[index] for outputs in alone]
        shapes = {(len(alone), *array.shape[1:]) for array in single}
        if any(not array.ndim or len(array) != 1 for array in single) or shapes != {batched.shape}:
            return f"output {index} of {len(alone)} rows has shape {list(batched.shape)}"
        apart = _largest_difference(batched, np.concatenate(single))
        half = batched.dtype.itemsize < np.float32().itemsize or any(name != CPU for name in providers)
        if not apart <= (APART_IN_HALF if half else APART):
            return f"output {index} of a row differs by {apart:.1e} of the largest number beside other rows"
    return ""


def _largest_difference(batched: np.ndarray, single: np.ndarray) -> float:
    """By the largest number; of what is no float, 1 if anything differs."""
    if not batched.size:
        return 0.0
    if batched.dtype.kind != "f":
        return float(not np.array_equal(batched, single))
    first, second = batched.astype(np.float64), single.astype(np.float64)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        off = float(np.abs(first - second)[~same].max())
        largest = max(float(np.abs(array[~np.isnan(array)]).max(initial=0.0)) for array in (first, second))
        return off / max(largest, float(np.finfo(np.float32).tiny))
