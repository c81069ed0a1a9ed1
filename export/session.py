"""Running a graph in this process, the same way each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    Arrays = Mapping[str, np.ndarray]

# One thread: the figures of two machines can be compared, and so can two runs on one.
INTRA_OP_THREADS = 1
BATCH = 64


class Session:
    """A graph loaded into onnxruntime's CPU provider, on one thread."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = INTRA_OP_THREADS
        options.log_severity_level = 3  # errors only; what matters of the warnings is checked here
        # Elsewhere than on ARM, graphs with INT8 activations would otherwise run in part in float.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name, of all rows in one batch."""
        return dict(zip(self.outputs, self._session.run(None, dict(inputs)), strict=True))

    def run_in_batches(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name, of any number of rows, at most 64 at a time."""
        parts = [self.run(take(inputs, start, start + BATCH)) for start in range(0, rows(inputs), BATCH)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}


def rows(arrays: Arrays) -> int:
    """Length of the batch axis.

    Raises:
        ExportError: the arrays differ in it, or there is none.
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ExportError(f"expected arrays with as many rows each, got {lengths}")
    return next(iter(lengths.values()))


def take(arrays: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows from `start` to below `stop`, of each array."""
    return {name: array[start:stop] for name, array in arrays.items()}


def cycle(arrays: Arrays, count: int) -> dict[str, np.ndarray]:
    """Exactly `count` rows, starting over where there are fewer."""
    return {name: array[np.arange(count) % len(array)] for name, array in arrays.items()}
