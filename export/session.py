"""Running a graph in this process, the same way each time."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Arrays = Mapping[str, np.ndarray]
    Shape = tuple[int | str | None, ...]

# One thread: the figures of two machines can be compared, and so can two runs on one.
INTRA_OP_THREADS = 1
BATCH = 64
CPU = "CPUExecutionProvider"
REMOTE = "AzureExecutionProvider"
ERRORS_ONLY, FATAL_ONLY = 3, 4


class Session:
    """A graph loaded into onnxruntime, on one thread.

    Attributes:
        inputs: names, in the graph's order.
        outputs: likewise.
        input_shapes: input name to its axes: a size, a symbol's name, or None for an axis without one.
        input_types: input name to onnxruntime's name for its type, "tensor(float)" for instance.
        batch_size: rows of every run, where all inputs' first axes are fixed to that number; else None.
    """

    def __init__(self, graph: bytes | Path, provider: str = CPU) -> None:
        """Load the graph.

        Args:
            graph: the content of an `.onnx` file, or its path; with external data it has to be the path.
            provider: onnxruntime's name of the execution provider; the CPU's takes what it leaves.

        Raises:
            ExportError: onnxruntime can't load the graph, or only without the provider.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = INTRA_OP_THREADS
        options.log_severity_level = ERRORS_ONLY  # what matters of the warnings is checked here
        # Elsewhere than on ARM, graphs with INT8 activations would otherwise run in part in float.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        self._session = _load(graph, options, provider)
        inputs = self._session.get_inputs()
        self.inputs = tuple(value.name for value in inputs)
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self.input_shapes: Mapping[str, Shape] = {value.name: tuple(value.shape) for value in inputs}
        self.input_types: Mapping[str, str] = {value.name: value.type for value in inputs}
        first = {shape[0] if shape else None for shape in self.input_shapes.values()}
        only = first.pop() if len(first) == 1 else None
        self.batch_size = only if isinstance(only, int) else None

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name, of all rows in one batch; arrays that are no input of the graph are left out.

        Raises:
            ExportError: an input is missing, or onnxruntime can't run the graph on these.
        """
        try:
            outputs = self._session.run(None, {name: inputs[name] for name in self.inputs})
        except KeyError as error:
            raise ExportError(f"input {error} is missing; there are {', '.join(inputs) or 'none'}") from error
        except Exception as error:
            raise ExportError(f"onnxruntime can't run the graph: {_one_line(error)}") from error
        return dict(zip(self.outputs, outputs, strict=True))

    def run_in_batches(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name, of any number of rows, at most 64 at a time; a fixed batch is filled up.

        Raises:
            ExportError: inputs or outputs have no rows or not as many each, or the graph can't run.
        """
        inputs = {name: inputs[name] for name in self.inputs if name in inputs}
        size = self.batch_size or BATCH
        parts = []
        for start in range(0, rows(inputs), size):
            part = take(inputs, start, start + size)
            filled = cycle(part, self.batch_size) if self.batch_size else part
            answer = self.run(filled)
            _require_rows(answer, rows(filled))
            parts.append(take(answer, 0, rows(part)))
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}


@cache
def providers() -> Mapping[str, str | None]:
    """This onnxruntime's execution providers, and why one can't be used; None for those that can.

    `onnxruntime.get_available_providers` names what was compiled in. Without its libraries or its device such
    a provider is dropped in silence, so a small graph is run on each.
    """
    return {name: _reason_against(name) for name in onnxruntime.get_available_providers()}


def usable_providers() -> tuple[str, ...]:
    """The execution providers that run graphs on this machine, in onnxruntime's order."""
    return tuple(name for name, reason in providers().items() if reason is None)


def _reason_against(provider: str) -> str | None:
    if provider == REMOTE:
        return "sends what it is given to a service"
    try:
        with _silence():
            # Of 32 × 32: some providers leave the smallest products to the CPU.
            found = Session(_product(32), provider).run({"x": np.ones((1, 32), np.float32)})["y"]
    except ExportError as error:
        return str(error)
    return None if np.allclose(found, 32.0) else "multiplies ones to something else"


def _product(size: int) -> bytes:
    """A graph that multiplies rows by a matrix of ones."""
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [size, size], [1.0] * size * size)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "ones"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size])],
        [ones],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return model.SerializeToString()


def _load(
    graph: bytes | Path, options: onnxruntime.SessionOptions, provider: str
) -> onnxruntime.InferenceSession:
    if provider not in (compiled_in := onnxruntime.get_available_providers()):
        raise ExportError(f"provider {provider!r}: this onnxruntime has only {', '.join(compiled_in)}")
    content = str(graph) if isinstance(graph, Path) else graph
    try:
        session = onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:
        # Some twenty classes without a common base, and pybind's own: UnicodeDecodeError, RuntimeError, ...
        name = f"{graph}: " if isinstance(graph, Path) else ""
        raise ExportError(f"{name}onnxruntime can't load the graph: {_one_line(error)}") from error
    if provider not in (took := session.get_providers()):
        raise ExportError(
            f"provider {provider!r} can't be used here: onnxruntime fell back to {', '.join(took)}; "
            "its libraries or its device are missing"
        )
    return session


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep onnxruntime from writing about libraries that it doesn't find."""
    onnxruntime.set_default_logger_severity(FATAL_ONLY)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # warnings, as it was


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _require_rows(outputs: Arrays, count: int) -> None:
    for name, array in outputs.items():
        if not isinstance(array, np.ndarray) or not array.ndim or len(array) != count:
            shape = array.shape if isinstance(array, np.ndarray) else type(array).__name__
            raise ExportError(f"output {name!r}: {count} rows in, {shape} out; it has no batch axis")


def rows(arrays: Arrays) -> int:
    """Length of the batch axis.

    Raises:
        ExportError: the arrays differ in it, or there is none.
    """
    lengths = {name: len(array) if array.ndim else "no axis" for name, array in arrays.items()}
    only = next(iter(lengths.values()), "no arrays")
    if len(set(lengths.values())) != 1 or not isinstance(only, int):
        raise ExportError(f"expected arrays with as many rows each, got {lengths}")
    return only


def take(arrays: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows from `start` to below `stop`, of each array."""
    return {name: array[start:stop] for name, array in arrays.items()}


def cycle(arrays: Arrays, count: int) -> dict[str, np.ndarray]:
    """Exactly `count` rows, starting over where there are fewer."""
    return {name: array[np.arange(count) % len(array)] for name, array in arrays.items()}
