"""What config.pbtxt says of a model's sequences (`sequence_batching`), checked.

As Triton's sequence batcher reads it (model_config.proto, ModelSequenceBatching).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.errors import ModelLoadError
from serve.pb import model_config_pb2 as pb
from serve.protocol.datatypes import BY_CONFIG_NAME, DATATYPES, DataType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEFAULT_IDLE_MICROSECONDS = 1_000_000
_MICROSECOND = 1e-6
_FALSE_TRUE_FIELDS = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
_ID_DATATYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


@dataclass(frozen=True, slots=True)
class ControlInput:
    """A graph input that the server fills: one element a row.

    Attributes:
        name: the graph input's.
        kind: START, READY, END or CORRID.
        datatype: its element type.
        false_true: the values of no and yes; empty for CORRID, which is the sequence's id.
    """

    name: str
    kind: str
    datatype: DataType
    false_true: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A graph output that becomes a graph input at the sequence's next request.

    Attributes:
        input_name: the graph input's.
        output_name: the graph output's.
        datatype: of both.
        dims: of both, without the batch dimension; -1 for a dimension of any size.
        initial_dims: the shape of the first request's state, no -1.
        initial_file: file of the first state's raw data in the model's folder `initial_state`; empty: zeros.
    """

    input_name: str
    output_name: str
    datatype: DataType
    dims: tuple[int, ...]
    initial_dims: tuple[int, ...]
    initial_file: str = ""


@dataclass(frozen=True, slots=True)
class SequenceSettings:
    """How a model's sequences are scheduled and what their requests carry along. Times are seconds.

    Attributes:
        max_idle: a sequence that has had no request for this long ends.
        slots: sequences whose requests may run; the others wait in the backlog, whole.
        max_rows: sequences in one run, at least 1.
        max_live: sequences at once, with a slot or in the backlog.
        oldest: Triton's strategy `oldest`; otherwise `direct`.
        max_queue_delay: how long a request may wait for others to run with.
        minimum_slot_utilization: direct: the share of `max_rows` from which a batch doesn't wait.
        preferred_sizes: oldest: batch sizes that don't wait, ascending.
        preserve_ordering: oldest: answers go out in the order in which the batcher took the requests.
        controls: inputs that tell the graph where in its sequence a row is.
        states: what the server keeps for each sequence.
    """

    max_idle: float
    slots: int
    max_rows: int
    max_live: int
    oldest: bool = False
    max_queue_delay: float = 0.0
    minimum_slot_utilization: float = 0.0
    preferred_sizes: tuple[int, ...] = ()
    preserve_ordering: bool = False
    controls: tuple[ControlInput, ...] = ()
    states: tuple[StateTensor, ...] = ()

    @property
    def direct(self) -> bool:
        """Whether the strategy is Triton's `direct`."""
        return not self.oldest

    @property
    def id_datatype(self) -> DataType | None:
        """The datatype that the graph takes the sequence's id in; None: it doesn't."""
        return next((control.datatype for control in self.controls if control.kind == "CORRID"), None)

    @property
    def first_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """The first shapes of those states that have a dimension of any size."""
        return tuple(state.initial_dims for state in self.states if -1 in state.dims)

    @classmethod
    def from_config(
        cls, message: pb.ModelSequenceBatching, max_batch_size: int, instances: int, max_live_sequences: int
    ) -> SequenceSettings:
        """Check a model's `sequence_batching`.

        Args:
            message: as config.pbtxt has it.
            max_batch_size: the model's; 0: one request a run.
            instances: runs at once, at least 1.
            max_live_sequences: sequences of the model at once, at least 1.

        Raises:
            ModelLoadError: a field has a value that can't be.
        """
        if message.iterative_sequence:
            raise _error("iterative_sequence", "true", "false: no graph asks to be run again")
        rows = max(1, max_batch_size)
        oldest = message.WhichOneof("strategy_choice") == "oldest"
        strategy = _oldest(message.oldest, rows, instances) if oldest else _direct(message.direct)
        idle = message.max_sequence_idle_microseconds or DEFAULT_IDLE_MICROSECONDS
        return cls(
            max_idle=idle * _MICROSECOND,
            max_rows=rows,
            max_live=max_live_sequences,
            controls=_controls(message.control_input),
            states=_states(message.state),
            **{"slots": rows * instances, **strategy},
        )


def _error(field: str, got: Any, expected: str) -> ModelLoadError:
    return ModelLoadError(f"config.pbtxt: sequence_batching.{field} is {got}, expected {expected}")


def _direct(message: pb.ModelSequenceBatching.StrategyDirect) -> dict[str, Any]:
    utilization = message.minimum_slot_utilization
    if not 0 <= utilization <= 1:
        raise _error("direct.minimum_slot_utilization", utilization, "0 to 1")
    return {
        "max_queue_delay": message.max_queue_delay_microseconds * _MICROSECOND,
        "minimum_slot_utilization": utilization,
    }


def _oldest(message: pb.ModelSequenceBatching.StrategyOldest, rows: int, instances: int) -> dict[str, Any]:
    if message.max_candidate_sequences < 0:
        raise _error("oldest.max_candidate_sequences", message.max_candidate_sequences, "0 or more")
    for size in message.preferred_batch_size:
        if not 1 <= size <= rows:
            raise _error("oldest.preferred_batch_size", size, f"1 to max_batch_size, {rows}")
    return {
        "oldest": True,
        "slots": (message.max_candidate_sequences or rows) * instances,
        "max_queue_delay": message.max_queue_delay_microseconds * _MICROSECOND,
        "preferred_sizes": tuple(sorted(set(message.preferred_batch_size))) or (rows,),
        "preserve_ordering": message.preserve_ordering,
    }


def _controls(messages: Sequence[Any]) -> tuple[ControlInput, ...]:
    controls = tuple(_control(message) for message in messages)
    _refuse_repeated("control_input.name", (control.name for control in controls))
    _refuse_repeated("control_input.control.kind", (control.kind for control in controls))
    return controls


def _control(message: pb.ModelSequenceBatching.ControlInput) -> ControlInput:
    if not message.name:
        raise _error("control_input.name", "empty", "the name of a graph input")
    if len(message.control) != 1:
        raise _error(f"control_input '{message.name}'", f"of {len(message.control)} controls", "one control")
    control = message.control[0]
    kind = pb.ModelSequenceBatching.Control.Kind.Name(control.kind).removeprefix("CONTROL_SEQUENCE_")
    what = f"control_input '{message.name}'"
    values = {field: tuple(getattr(control, field)) for field in _FALSE_TRUE_FIELDS}
    stated = [field for field, pair in values.items() if pair]
    if kind == "CORRID":
        datatype = pb.DataType.Name(control.data_type)
        if datatype not in _ID_DATATYPES or stated:
            raise _error(what, f"{datatype} {stated}", f"one of {', '.join(_ID_DATATYPES)}")
        return ControlInput(message.name, kind, BY_CONFIG_NAME[datatype])
    if len(stated) != 1 or len(values[stated[0]]) != 2:  # noqa: PLR2004 - false and true
        raise _error(what, f"of {values}", f"two values in one of {', '.join(values)}")
    return ControlInput(message.name, kind, DATATYPES[_FALSE_TRUE_FIELDS[stated[0]]], values[stated[0]])


def _states(messages: Sequence[Any]) -> tuple[StateTensor, ...]:
    states = tuple(_state(message) for message in messages)
    _refuse_repeated("state.input_name", (state.input_name for state in states))
    _refuse_repeated("state.output_name", (state.output_name for state in states))
    return states


def _state(message: pb.ModelSequenceBatching.State) -> StateTensor:
    for field in ("input_name", "output_name"):
        if not getattr(message, field):
            raise _error(f"state.{field}", "empty", "the name of a tensor of the graph")
    what = f"state '{message.input_name}'"
    if message.use_growable_memory:
        raise _error(f"{what}.use_growable_memory", "true", "false: it needs CUDA's virtual memory")
    datatype = BY_CONFIG_NAME.get(pb.DataType.Name(message.data_type))
    if datatype is None:
        raise _error(f"{what}.data_type", pb.DataType.Name(message.data_type), "the tensors' datatype")
    dims = tuple(message.dims)
    if any(dim != -1 and dim < 1 for dim in dims):
        raise _error(f"{what}.dims", list(dims), "-1 or sizes of 1 and more")
    if len(message.initial_state) > 1:
        raise _error(f"{what}.initial_state", f"given {len(message.initial_state)} times", "one or none")
    if not message.initial_state:
        # Triton leaves the first request's state undefined here; of a dimension of any size it, too, makes 1.
        initial_dims = tuple(1 if dim == -1 else dim for dim in dims)
        return StateTensor(message.input_name, message.output_name, datatype, dims, initial_dims)
    initial = message.initial_state[0]
    initial_dims = _initial_dims(f"{what}.initial_state", initial, message.data_type, dims)
    return StateTensor(
        message.input_name, message.output_name, datatype, dims, initial_dims, initial.data_file
    )


def _initial_dims(what: str, initial: Any, data_type: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    if initial.data_type != data_type:
        raise _error(f"{what}.data_type", pb.DataType.Name(initial.data_type), "the state's own")
    if not initial.name:
        raise _error(f"{what}.name", "empty", "any name, as in Triton")
    stated = tuple(initial.dims)
    if len(stated) != len(dims) or any(
        size < 1 or dim not in (-1, size) for size, dim in zip(stated, dims, strict=True)
    ):
        raise _error(f"{what}.dims", list(stated), f"sizes that fit the state's {list(dims)}")
    choice = initial.WhichOneof("state_data")
    if choice is None or (choice == "data_file" and not initial.data_file):
        raise _error(what, "without data", "zero_data or data_file")
    return stated


def _refuse_repeated(field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _error(field, f"'{name}' twice", "each one once")
        seen.add(name)
