"""A graph's inputs and outputs as its file declares them, and sizes for their symbolic axes."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.errors import ExportError
from export.inspection.parameters import type_name
from export.inspection.trace import Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx


@dataclass(frozen=True)
class Tensor:
    """An input or output: its ONNX type, and its shape with numbers, symbols, and "?" for unnamed axes."""

    name: str
    type: str
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        axes = "of unknown shape" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        return f"{self.type} {axes}"


def graph_inputs(model: onnx.ModelProto) -> tuple[Tensor, ...]:
    """The inputs that a client has to send."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return tuple(describe_value(value) for value in model.graph.input if value.name not in stored)


def describe_value(value: onnx.ValueInfoProto) -> Tensor:
    """An input or output as the file declares it."""
    kind = value.type.WhichOneof("value") or "unknown"
    if kind != "tensor_type":
        return Tensor(value.name, kind.removesuffix("_type"), None)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return Tensor(value.name, type_name(tensor.elem_type), None)
    axes = (
        axis.dim_value if axis.HasField("dim_value") and axis.dim_value >= 0 else axis.dim_param or "?"
        for axis in tensor.shape.dim
    )
    return Tensor(value.name, type_name(tensor.elem_type), tuple(axes))


def symbols(tensor: Tensor) -> dict[int, str]:
    """Axis to the name that `--shape` has for it, of all axes without a fixed size."""
    return {
        axis: f"{tensor.name}.{axis}" if size == "?" else str(size)
        for axis, size in enumerate(tensor.shape or ())
        if isinstance(size, str)
    }


def axis_sizes(inputs: Sequence[Tensor], given: Mapping[str, int]) -> dict[str, int]:
    """Symbolic axis of the inputs to its size: as given, else 1.

    Raises:
        ExportError: a size is given for an axis that isn't there.
    """
    names = dict.fromkeys(name for tensor in inputs for name in symbols(tensor).values())
    if unknown := sorted(given.keys() - names):
        has = ", ".join(names) or "none"
        raise ExportError(f"--shape {unknown[0]}: no such symbolic axis among the inputs' ({has})")
    return {name: given.get(name, 1) for name in names}


def input_values(inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> dict[str, Value]:
    """Input name to type and shape with the symbols replaced; only tensors of known rank."""
    values = {}
    for tensor in inputs:
        if tensor.shape is None:
            continue
        names = symbols(tensor)
        shape = [sizes[names[axis]] if axis in names else int(size) for axis, size in enumerate(tensor.shape)]
        values[tensor.name] = Value(tensor.type, tuple(shape))
    return values


def add_shape_flag(parser: argparse.ArgumentParser, explanation: str) -> None:
    """Give a command `--shape`, which may be repeated; `given_sizes` reads it."""
    parser.add_argument(
        "--shape", action="append", default=[], type=parse_sizes, metavar="AXIS=SIZE,...", help=explanation
    )


def given_sizes(options: argparse.Namespace) -> dict[str, int]:
    """Symbolic axis to size, of all `--shape`."""
    return {name: size for given in options.shape for name, size in given.items()}


def parse_sizes(text: str) -> dict[str, int]:
    """`time=128,height=224` as a mapping; names may hold commas and equal signs themselves.

    Raises:
        argparse.ArgumentTypeError: it is no such list.
    """
    sizes = {}
    for part in re.split(r",(?=[^,=]+=)", text):
        name, _, size = part.rpartition("=")
        if not name or not size.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r}: expected AXIS=SIZE, such as time=128")
        sizes[name] = int(size)
    return sizes
