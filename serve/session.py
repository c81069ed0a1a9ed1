"""One loaded graph: run(inputs) → outputs, on onnxruntime."""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ModelLoadError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from serve.request import Call

_BFLOAT16 = "tensor(bfloat16)"
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16

# Triton's optimization.graph.level: 0 is "not set", 2 switches every optimization off.
_GRAPH_LEVELS = {
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a graph is to be run.

    Attributes:
        providers: onnxruntime's provider names, most wanted first.
        intra_op_threads: threads within one run, at least 1.
        inter_op_threads: threads across a graph's branches; above 1 they run in parallel.
        graph_level: Triton's optimization.graph.level, one of -1, 0, 1, 2.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    intra_op_threads: int = 1
    inter_op_threads: int = 1
    graph_level: int = 0

    def __post_init__(self) -> None:
        """Check the figures that come from a config file."""
        if self.graph_level not in _GRAPH_LEVELS:
            raise ModelLoadError(
                f"optimization.graph.level is {self.graph_level}, expected one of {sorted(_GRAPH_LEVELS)}"
            )


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A graph's input or output: onnxruntime's type string, and its shape with -1 for what is not fixed."""

    name: str
    onnx_type: str
    shape: tuple[int, ...]


class Session:
    """A graph in memory. `run` may be called from several threads at once.

    Raises:
        ModelLoadError: onnxruntime can't load the graph on any of the providers.
    """

    def __init__(self, path: Path, settings: SessionSettings) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.intra_op_threads
        options.inter_op_num_threads = settings.inter_op_threads
        if settings.inter_op_threads > 1:
            options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        options.graph_optimization_level = _GRAPH_LEVELS[settings.graph_level]
        # Spinning threads burn the cores that the next request wants; a board has no core to spare.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # Fatal only: what goes wrong comes back as an exception, and a client's bad index is no log line.
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(path, options, providers=list(settings.providers))
        except Exception as error:  # onnxruntime's errors share no base class; UnicodeDecodeError too is one
            # Clients see this message, and the server's folders are none of their business.
            raise ModelLoadError(_first_line(error).replace(str(path), path.name)) from error
        self.inputs = tuple(_graph_tensor(node) for node in self._session.get_inputs())
        self.outputs = tuple(_graph_tensor(node) for node in self._session.get_outputs())
        self._bfloat16_inputs = {t.name for t in self.inputs if t.onnx_type == _BFLOAT16}
        self._has_bfloat16 = any(t.onnx_type == _BFLOAT16 for t in (*self.inputs, *self.outputs))

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers that onnxruntime really uses, which may be fewer than it was asked for."""
        return tuple(self._session.get_providers())

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], call: Call) -> list[np.ndarray]:
        """Run the graph once.

        Args:
            inputs: input name to array, of the graph's datatypes; strings as objects of `str`.
            outputs: names of the outputs to compute.
            call: its cancellation ends the run at the next node.

        Raises:
            InvalidArgumentError: onnxruntime refuses an input.
            CanceledError, DeadlineExceededError: the call was given up meanwhile.
            InternalError: the graph failed.
        """
        run_options = ort.RunOptions()
        call.run_options = run_options
        if call.cancelled:
            raise CanceledError("the request was cancelled before it ran")
        try:
            if self._has_bfloat16:
                return self._run_values(inputs, outputs, run_options)
            return self._session.run(outputs, inputs, run_options)  # type: ignore[no-any-return] # untyped
        except Exception as error:
            raise _run_error(error, call) from error
        finally:
            call.run_options = None

    def _run_values(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], run_options: Any
    ) -> list[np.ndarray]:
        """As `run`, for graphs with BF16 tensors, which numpy has no type for: their bits go in as uint16."""
        values = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _ONNX_BFLOAT16)
            if name in self._bfloat16_inputs
            else ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in inputs.items()
        }
        return [_numpy(v) for v in self._session.run_with_ort_values(outputs, values, run_options)]


def _numpy(value: Any) -> np.ndarray:
    if value.data_type() != _BFLOAT16:
        return value.numpy()  # type: ignore[no-any-return] # untyped
    shape = value.shape()
    count = math.prod(shape)
    if not count:
        return np.empty(shape, np.uint16)
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.frombuffer(bits, np.uint16).reshape(shape).copy()


def _graph_tensor(node: Any) -> GraphTensor:
    # Symbolic dimensions are strings, unknown ones None, some exporters write 0 or -1 for them.
    return GraphTensor(
        node.name, node.type, tuple(d if isinstance(d, int) and d > 0 else -1 for d in node.shape)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _run_error(error: Exception, call: Call) -> Exception:
    if call.cancelled:
        return CanceledError("the request was cancelled while it ran")
    if call.expired(time.monotonic()):
        return DeadlineExceededError("the request's deadline passed while it ran")
    # Also what a node says of its data is "InvalidArgument", but only once the graph runs.
    if type(error).__name__ == "InvalidArgument" and "while running" not in str(error):
        return InvalidArgumentError(_first_line(error))
    return InternalError(f"onnxruntime: {_first_line(error)}")
