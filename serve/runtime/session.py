"""One loaded graph: run(inputs) → outputs, on onnxruntime."""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import dataclass, field, replace
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
from serve.runtime.fallback import GRAPH_LEVELS, open_session
from serve.runtime.providers import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from serve.request import Call
    from serve.runtime.placement import Placement
    from serve.runtime.providers import Accelerator

_BFLOAT16 = "tensor(bfloat16)"
_STRING = "tensor(string)"
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16

SHRINKAGE = "memory.enable_memory_arena_shrinkage"


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a graph is to be run.

    Attributes:
        accelerators: providers wanted beside the CPU, most wanted first.
        strict: refuse the graph where they don't run all of it, instead of going on with what works.
        instances: how many runs the model lets go on at once.
        intra_op_threads: threads within one run, at least 1.
        inter_op_threads: threads across a graph's branches, where `parallel`.
        parallel: whether independent branches run at the same time.
        shared_pool: these threads are one pool for all graphs of the process.
        graph_level: Triton's optimization.graph.level, one of -1, 0, 1, 2.
        memory_arena: keep freed CPU memory for the next run.
        memory_pattern: allocate a run's tensors at once where their sizes are known.
        arena_shrinkage: arenas to give back after each run, such as `cpu:0;gpu:0`; empty: none.
        entries: onnxruntime's session configuration entries.
        model: its name, for the log.
    """

    accelerators: tuple[Accelerator, ...] = ()
    strict: bool = False
    instances: int = 1
    intra_op_threads: int = 1
    inter_op_threads: int = 1
    parallel: bool = False
    shared_pool: bool = False
    graph_level: int = 0
    memory_arena: bool = True
    memory_pattern: bool = True
    arena_shrinkage: str = ""
    entries: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        """Check the figures that come from a config file."""
        if self.graph_level not in GRAPH_LEVELS:
            raise ModelLoadError(
                f"optimization.graph.level is {self.graph_level}, expected one of {sorted(GRAPH_LEVELS)}"
            )
        if self.arena_shrinkage and not self.memory_arena:
            raise ModelLoadError(f"{SHRINKAGE} needs the arena that enable_mem_arena switches off")

    def on_cpu(self) -> SessionSettings:
        """The same without accelerators."""
        return replace(self, accelerators=(), strict=False)

    def demoted(self) -> SessionSettings | None:
        """The same without the accelerator most wanted, for one that failed; None where there is no other."""
        if self.strict or not self.accelerators:
            return None
        return replace(self, accelerators=self.accelerators[1:])


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A graph's input or output: onnxruntime's type string, and its shape with -1 for what is not fixed."""

    name: str
    onnx_type: str
    shape: tuple[int, ...]


class Session:
    """A graph in memory. `run` may be called from several threads at once.

    Attributes:
        settings: as asked for, with the accelerators that are really used.
        placement: which nodes run on which provider.
        inputs, outputs: the graph's.
        file_bytes: size of the graph's file, tensors in files of their own not counted.

    Raises:
        ModelLoadError: onnxruntime can't load the graph, or not on the providers that it must run on.
    """

    def __init__(self, path: Path, settings: SessionSettings) -> None:
        self.settings: SessionSettings
        self.placement: Placement
        self._session, self.settings, self.placement = open_session(path, settings)
        self.file_bytes = path.stat().st_size
        self._arena_shrinkage = settings.arena_shrinkage
        # None where it says nothing: onnxruntime looks for an entry in it before each bound run, and to find
        # none takes 48 µs.
        self._bound_options = self._run_options() if self._arena_shrinkage else None
        self.inputs = tuple(_graph_tensor(node) for node in self._session.get_inputs())
        self.outputs = tuple(_graph_tensor(node) for node in self._session.get_outputs())
        self._bfloat16_inputs = {t.name for t in self.inputs if t.onnx_type == _BFLOAT16}
        self._has_bfloat16 = any(t.onnx_type == _BFLOAT16 for t in (*self.inputs, *self.outputs))
        if self._has_bfloat16 and any(t.onnx_type == _STRING for t in self.inputs):
            raise ModelLoadError(
                "the graph has BF16 tensors and an input of strings, which onnxruntime's Python API can't "
                "take together: make one of them another type"
            )

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers that onnxruntime really uses, which may be fewer than it was asked for."""
        return self.placement.providers

    def close(self) -> None:
        """Give the graph's memory back, as soon as the last run that is going on has ended."""
        self._session = None

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], call: Call | None = None
    ) -> list[np.ndarray]:
        """Run the graph once.

        Args:
            inputs: input name to array, of the graph's datatypes; strings as objects of `str`.
            outputs: names of the outputs to compute.
            call: its cancellation ends the run at the next node; None: nobody can end it.

        Raises:
            InvalidArgumentError: onnxruntime refuses an input.
            CanceledError, DeadlineExceededError: the call was given up meanwhile.
            InternalError: the graph failed, or the session is closed.
        """
        session = self._session
        if session is None:
            raise InternalError("the model's session is closed")
        run_options = self._run_options()
        if call is not None:
            call.run_options = run_options
            if call.cancelled:
                raise CanceledError("the request was cancelled before it ran")
        try:
            if self._has_bfloat16:
                return self._run_values(session, inputs, outputs, run_options)
            return session.run(outputs, inputs, run_options)  # type: ignore[no-any-return] # untyped
        except Exception as error:
            raise _run_error(error, call) from error
        finally:
            if call is not None:
                call.run_options = None

    def binding(self) -> Any:
        """An onnxruntime IOBinding: which memory the graph reads and writes, to be kept for many runs.

        Raises:
            InternalError: the session is closed.
        """
        if self._session is None:
            raise InternalError("the model's session is closed")
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> None:
        """Run the graph once, on the memory of one of its bindings.

        Raises:
            InternalError: the graph failed, or the session is closed.
        """
        session = self._session
        if session is None:
            raise InternalError("the model's session is closed")
        try:
            session.run_with_iobinding(binding, self._bound_options)
        except Exception as error:
            raise InternalError(f"onnxruntime: {first_line(error)}") from error

    def _run_options(self) -> Any:
        options = ort.RunOptions()
        if self._arena_shrinkage:
            options.add_run_config_entry(SHRINKAGE, self._arena_shrinkage)
        return options

    def _run_values(
        self, session: Any, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], run_options: Any
    ) -> list[np.ndarray]:
        """As `run`, for graphs with BF16 tensors, which numpy has no type for: their bits go in as uint16."""
        values = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _ONNX_BFLOAT16)
            if name in self._bfloat16_inputs
            else ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in inputs.items()
        }
        return [_numpy(v) for v in session.run_with_ort_values(outputs, values, run_options)]


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


def _run_error(error: Exception, call: Call | None) -> Exception:
    if call is not None and call.cancelled:
        return CanceledError("the request was cancelled while it ran")
    if call is not None and call.expired(time.monotonic()):
        return DeadlineExceededError("the request's deadline passed while it ran")
    # Also what a node says of its data is "InvalidArgument", but only once the graph runs.
    if type(error).__name__ == "InvalidArgument" and "while running" not in str(error):
        return InvalidArgumentError(first_line(error))
    return InternalError(f"onnxruntime: {first_line(error)}")
