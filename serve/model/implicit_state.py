"""The tensors that the server itself feeds to a sequence model: control inputs, and the state it keeps.

Triton's control inputs and implicit state. A state output of one run is the state input of the same
sequence's next run; a client neither sends nor needs to see it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.errors import InternalError, ModelLoadError
from serve.model.tensor_file import MAX_BYTES, read_tensor
from serve.scheduling.live_sequences import LiveSequence, SequenceStep
from serve.scheduling.sequence_config import SequenceSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from serve.pb import model_config_pb2 as pb
    from serve.protocol.datatypes import DataType
    from serve.runtime.session import GraphTensor
    from serve.scheduling.scheduler import QueuedRequest
    from serve.scheduling.sequence_config import ControlInput, StateTensor

INITIAL_STATE_FOLDER = "initial_state"


def hidden_inputs(message: pb.ModelConfig) -> set[str]:
    """The graph inputs that the server fills, which clients neither see nor send.

    Raises:
        ModelLoadError: the config lists one of them among the inputs, too.
    """
    sequences = message.sequence_batching
    hidden = {control.name for control in sequences.control_input}
    hidden |= {state.input_name for state in sequences.state}
    for stated in message.input:
        if stated.name in hidden:
            raise ModelLoadError(
                f"config.pbtxt: input '{stated.name}' is a control or state of sequence_batching, which the "
                "server fills: remove it from the inputs"
            )
    return hidden


def hidden_outputs(message: pb.ModelConfig) -> set[str]:
    """The graph outputs that the server keeps; a client gets one only if the config lists it as an output."""
    return {state.output_name for state in message.sequence_batching.state}


def warm_up_inputs(
    message: pb.ModelConfig,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    folder: Path,
    rows: int,
) -> dict[str, np.ndarray]:
    """What the first requests of `rows` sequences need beside their own inputs; nothing without sequences.

    Args:
        message: the model's config.
        inputs: the graph's.
        outputs: the graph's.
        folder: the model's.
        rows: of the run.

    Raises:
        ModelLoadError: `sequence_batching` can't be, or doesn't fit the graph.
    """
    if not message.HasField("sequence_batching"):
        return {}
    settings = SequenceSettings.from_config(message.sequence_batching, message.max_batch_size, 1, 1)
    return ImplicitState(settings, inputs, outputs, message.max_batch_size, folder).first_feed(rows)


class ImplicitState:
    """Makes the inputs that clients don't send, and keeps the outputs that the next run needs.

    Attributes:
        extra_outputs: graph outputs to fetch for `store`.

    Raises:
        ModelLoadError: the graph has no such tensor, or of another datatype or shape; or the file of an
            initial state can't be used.
    """

    def __init__(
        self,
        settings: SequenceSettings,
        inputs: Sequence[GraphTensor],
        outputs: Sequence[GraphTensor],
        max_batch_size: int,
        folder: Path,
    ) -> None:
        """Check the settings against the graph and read the initial states.

        Args:
            settings: the model's.
            inputs: the graph's.
            outputs: the graph's.
            max_batch_size: the model's; 0: tensors have no batch dimension.
            folder: the model's, which may hold `initial_state/`.
        """
        self._batched = max_batch_size > 0
        self._controls = settings.controls
        self._states = settings.states
        self.extra_outputs = tuple(state.output_name for state in settings.states)
        rows = (-1,) if self._batched else ()
        for control in settings.controls:
            _check("control_input.name", control.name, control.datatype, (*rows, 1), inputs)
        for state in settings.states:
            _check("state.input_name", state.input_name, state.datatype, (*rows, *state.dims), inputs)
            _check("state.output_name", state.output_name, state.datatype, (*rows, *state.dims), outputs)
        self._initial = tuple(_initial_state(state, folder) for state in settings.states)

    def feed(self, batch: Sequence[QueuedRequest]) -> dict[str, np.ndarray]:
        """The control and state inputs of requests that run together, by name, a row for each in order.

        Controls are [rows, 1], states [rows, *dims]; without a batch dimension [1] and [*dims].
        """
        return self._feed([queued.sequence for queued in batch])

    def first_feed(self, rows: int) -> dict[str, np.ndarray]:
        """As `feed`, for the first requests of `rows` sequences that nobody has: to warm a graph up."""
        textual = any(c.kind == "CORRID" and c.datatype.name == "BYTES" for c in self._controls)
        steps = [
            SequenceStep(LiveSequence("0" if textual else 0, ()), start=True, end=True) for _ in range(rows)
        ]
        return self._feed(steps)

    def store(self, batch: Sequence[QueuedRequest], outputs: Mapping[str, np.ndarray]) -> None:
        """Keep the state after a run, for each of its sequences.

        Args:
            batch: as it was given to `feed`.
            outputs: those of `extra_outputs`, by name; a row for each request.

        Raises:
            InternalError: a state has another shape than it was declared with; no state is kept then.
        """
        arrays = [outputs[name] for name in self.extra_outputs]
        for state, array in zip(self._states, arrays, strict=True):
            self._check_shape(state, array, len(batch))
        for row, queued in enumerate(batch):
            sequence: LiveSequence = queued.sequence.sequence
            if queued.sequence.end:
                sequence.state = None
                continue
            sequence.state = tuple(self._row(array, row) for array in arrays)
            sequence.state_shape = tuple(
                kept.shape
                for state, kept in zip(self._states, sequence.state, strict=True)
                if -1 in state.dims
            )

    def _feed(self, steps: Sequence[SequenceStep]) -> dict[str, np.ndarray]:
        feed = {control.name: self._control(control, steps) for control in self._controls}
        if self._states:
            kept = [self._initial if s.start else s.sequence.state or self._initial for s in steps]
            for state, rows in zip(self._states, zip(*kept, strict=True), strict=True):
                feed[state.input_name] = self._stacked(rows)
        return feed

    def _control(self, control: ControlInput, steps: Sequence[SequenceStep]) -> np.ndarray:
        values = [_control_value(control, step) for step in steps]
        if control.kind == "CORRID" and control.datatype.name != "BYTES":
            # A narrower type gets the low bits.
            array = np.array(values, np.uint64).astype(control.datatype.dtype)
        else:
            array = np.array(values, control.datatype.dtype)
        return array[:, np.newaxis] if self._batched else array

    def _stacked(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        if not self._batched:
            return rows[0]
        return rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows)

    def _row(self, array: np.ndarray, row: int) -> np.ndarray:
        """One request's part: a copy, as a view would keep the whole batch's array in memory."""
        if not self._batched:
            return array
        return array[0, ...] if len(array) == 1 else array[row, ...].copy()

    def _check_shape(self, state: StateTensor, array: np.ndarray, rows: int) -> None:
        expected = (rows, *state.dims) if self._batched else state.dims
        if array.shape != expected and not _fits(array.shape, expected):
            raise InternalError(
                f"the graph gave the state '{state.output_name}' the shape {list(array.shape)}, "
                f"expected {list(expected)}"
            )


def _control_value(control: ControlInput, step: SequenceStep) -> Any:
    if control.kind == "CORRID":
        return step.sequence.id
    # Every row is a request, so each one is ready.
    return control.false_true[step.start if control.kind == "START" else control.kind == "READY" or step.end]


def _fits(shape: Sequence[int], allowed: Sequence[int]) -> bool:
    """Whether a shape has the rank and every fixed dimension of `allowed`, where -1 is any size."""
    return len(shape) == len(allowed) and all(
        want in (-1, got) for want, got in zip(allowed, shape, strict=True)
    )


def _check(
    what: str, name: str, datatype: DataType, shape: tuple[int, ...], graph: Sequence[GraphTensor]
) -> None:
    """Check a control or state tensor against the graph's of that name; -1 is any size."""
    tensor = next((tensor for tensor in graph if tensor.name == name), None)
    if tensor is None:
        raise ModelLoadError(
            f"config.pbtxt: sequence_batching: {what} is '{name}', the graph has {[t.name for t in graph]}"
        )
    if tensor.onnx_type != datatype.onnx:
        raise ModelLoadError(
            f"config.pbtxt: sequence_batching: {what} '{name}' is {datatype.config}, "
            f"the graph has {tensor.onnx_type}"
        )
    # onnxruntime describes a tensor of unknown rank as it does a scalar, so [] takes any shape.
    if tensor.shape and not _fits(shape, tensor.shape):
        raise ModelLoadError(
            f"config.pbtxt: sequence_batching: {what} '{name}' has the shape {list(shape)}, "
            f"the graph has {list(tensor.shape)}"
        )


def _initial_state(state: StateTensor, folder: Path) -> np.ndarray:
    size = math.prod(state.initial_dims) * max(1, state.datatype.itemsize)
    if size > MAX_BYTES:
        raise ModelLoadError(
            f"config.pbtxt: state '{state.input_name}' has {size} bytes, expected {MAX_BYTES} at most"
        )
    if state.initial_file:
        what = f"config.pbtxt: state '{state.input_name}': initial_state.data_file"
        root = folder / INITIAL_STATE_FOLDER
        return read_tensor(what, root, state.initial_file, state.datatype, state.initial_dims)
    if state.datatype.name == "BYTES":
        return np.full(state.initial_dims, "", object)
    return np.zeros(state.initial_dims, state.datatype.dtype)
