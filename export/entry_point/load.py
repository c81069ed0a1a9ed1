"""Any torch network: `module:function`, where the function returns the module and example inputs.

    python -m export some/where/net.py:make --to models

The function takes no arguments and returns `(module, inputs)`: inputs a tensor, a tuple or list of tensors,
or a dict of them by name, each with at least two rows along axis 0; with 32 or more, half of them calibrate.
With `--pixels` an input of normalized images becomes one of pixels. The function may return a
`train.family.ServingGraph` instead, with data, metric and axes of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from export.entry_point.data import EntryPointOptions, serving_data
from export.entry_point.function import call_function, is_path
from export.entry_point.module import HALF, ServedModule, positional_names, prepare, serve_module
from export.entry_point.pixels import Normalize, image_input, is_normalized, pixel_input, to_pixels
from export.errors import ExportError
from export.explanation import place_of, summary
from export.settings import NAME
from train.family import ExampleInputs, ServingGraph

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

__all__ = ["EntryPoint", "EntryPointOptions", "is_entry_point", "load_entry_point"]

EXAMPLE_ROWS = 2
EXPECTED = (
    "expected (module, inputs): a torch.nn.Module, and a tensor, a tuple or list of tensors, or a dict of "
    "tensors by input name"
)
SAME = {"rtol": 1e-3, "atol": 1e-4}


@dataclass(frozen=True)
class EntryPoint:
    """A network that a function returned.

    Attributes:
        name: what the entry is called by default: the Python module's name.
        graph: the network with rows to calibrate and judge it with.
        provenance: JSON values for the report.
    """

    name: str
    graph: ServingGraph
    provenance: Mapping[str, Any]


def is_entry_point(text: str) -> bool:
    """Whether a source is `module:function`; anything else is a folder."""
    module, colon, function = text.rpartition(":")
    return bool(module and colon and function.isidentifier()) and not Path(text).exists()


def load_entry_point(text: str, options: EntryPointOptions, say: Callable[[str], None]) -> EntryPoint:
    """Import the module, call the function, and make a graph of what it returns.

    Args:
        text: `module:function`; see `export.entry_point.function.call_function`.
        options: axes, rows and labels.
        say: called with notes on what was changed.

    Raises:
        ExportError: the function can't be had or called, or what it returns can't be served.
    """
    returned, file = call_function(text)
    if isinstance(returned, ServingGraph):
        graph = _own_graph(text, returned, options, say)
    else:
        graph = _serving_graph(text, returned, options, say)
    module_name = text.rpartition(":")[0]
    name = Path(module_name).stem if is_path(module_name) else module_name.rpartition(".")[2]
    return EntryPoint(
        name if NAME.fullmatch(name) else "model",
        graph,
        {
            "entry_point": text,
            "entry_point_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file else None,
            "parameters": sum(parameter.numel() for parameter in graph.module.parameters()),
            **({"pixels": options.pixels.name} if options.pixels else {}),
        },
    )


def _own_graph(
    text: str, graph: ServingGraph, options: EntryPointOptions, say: Callable[[str], None]
) -> ServingGraph:
    if options != EntryPointOptions():
        raise ExportError(
            f"{text} returned a ServingGraph, which has data, labels and axes of its own: drop "
            f"{', '.join(options.flags())}"
        )
    return dataclasses.replace(graph, module=prepare(graph.module, say))


def _serving_graph(
    text: str, returned: Any, options: EntryPointOptions, say: Callable[[str], None]
) -> ServingGraph:
    match returned:
        case (nn.Module() as module, given):
            pass
        case _:
            raise ExportError(f"{text} returned {_described(returned)}; {EXPECTED}")
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    module = prepare(module, say)
    inputs = {
        name: _input(f"{text}: input {name!r}", tensor, {*HALF, torch.float64} if double else HALF)
        for name, tensor in _by_name(text, module, given).items()
    }
    _check_rows(text, inputs)
    inputs, options, reading = _from_pixels(inputs, options, say)
    _check_dynamic_axes(inputs, options.dynamic_axes)
    served = serve_module(module, list(inputs), reading, named=isinstance(given, Mapping)).eval()
    tensors = {name: tensor[:EXAMPLE_ROWS].clone() for name, tensor in inputs.items()}
    outputs = _outputs(text, served, tensors)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    data, metric = serving_data(served, arrays, outputs, options)
    axes = {name: {0: "batch", **options.dynamic_axes.get(name, {})} for name in inputs}
    image = pixel_input(arrays)
    if image:
        _mention_one_size(image, arrays[image].shape, axes[image], say)
    return ServingGraph("", served, ExampleInputs(tensors, axes, outputs), data, metric, image)


def _from_pixels(
    inputs: dict[str, torch.Tensor], options: EntryPointOptions, say: Callable[[str], None]
) -> tuple[dict[str, torch.Tensor], EntryPointOptions, dict[str, nn.Module]]:
    """The inputs and rows with pixels for images, where that was asked for, and what normalizes them."""
    scaling = options.pixels
    if scaling is None:
        return inputs, options, {}
    name = image_input(inputs)
    scaling.check_channels(inputs[name].shape[1])
    if 3 in options.dynamic_axes.get(name, {}):  # noqa: PLR2004 - the last axis
        raise ExportError(
            f"--dynamic {name}:3={options.dynamic_axes[name][3]}: with --pixels the axes of {name!r} are "
            "[batch, height, width, channels]; name 1 or 2"
        )
    rows = options.rows
    # An example that only shows the shape, beside rows of a file, may hold anything.
    said = say if rows is None else lambda _: None
    example = to_pixels(f"the example {name!r}", inputs[name].numpy(), scaling, said)
    if rows is not None and name in rows and is_normalized(rows[name], inputs[name].shape[1]):
        rows = {**rows, name: to_pixels(f"--data {name!r}", rows[name], scaling, say)}
    changed = dataclasses.replace(options, rows=rows)
    return {**inputs, name: torch.from_numpy(example)}, changed, {name: Normalize(scaling)}


def _mention_one_size(
    name: str, shape: tuple[int, ...], axes: Mapping[int, str], say: Callable[[str], None]
) -> None:
    _, height, width, _ = shape
    if height != width and not {1, 2} & axes.keys():
        say(
            f"note: input {name!r} is {height} pixels high and {width} wide; a graph resizes images for "
            "square inputs only, so clients send this size"
        )


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def _by_name(text: str, module: nn.Module, given: Any) -> dict[str, torch.Tensor | np.ndarray]:
    if isinstance(given, Mapping):
        tensors = {str(name): tensor for name, tensor in given.items()}
    else:
        listed = list(given) if isinstance(given, tuple | list) else [given]
        tensors = {f"inputs[{index}]": tensor for index, tensor in enumerate(listed)}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor | np.ndarray):
            raise ExportError(f"{text}: {name} is a {type(tensor).__name__}, expected a tensor")
    if not tensors:
        raise ExportError(f"{text} returned no inputs; {EXPECTED}")
    if isinstance(given, Mapping):
        return tensors
    return dict(zip(positional_names(module, len(tensors)), tensors.values(), strict=True))


def _input(what: str, given: torch.Tensor | np.ndarray, to_float32: AbstractSet[torch.dtype]) -> torch.Tensor:
    """An example input as a dense tensor of its own on the CPU."""
    tensor = torch.as_tensor(given)
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ExportError(
            f"{what} is {tensor.dtype}, {tensor.layout} on {tensor.device}, expected plain numbers"
        )
    if tensor.dtype in to_float32:
        tensor = tensor.float()
    return tensor.detach().cpu().contiguous().clone()  # a tensor given twice is two inputs


def _check_rows(text: str, inputs: Mapping[str, torch.Tensor]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) != 1 or min(counts) < EXAMPLE_ROWS:
        found = ", ".join(f"{name!r} {shape}" for name, shape in shapes.items())
        raise ExportError(
            f"{text}: inputs are {found}; expected the same number of rows along axis 0 of each, at least 2"
        )


def _check_dynamic_axes(
    inputs: Mapping[str, torch.Tensor], dynamic_axes: Mapping[str, Mapping[int, str]]
) -> None:
    sizes: dict[str, int] = {}
    for name, axes in dynamic_axes.items():
        for axis, symbol in axes.items():
            flag = f"--dynamic {name}:{axis}={symbol}"
            if name not in inputs:
                raise ExportError(f"{flag}: the inputs are {', '.join(inputs)}")
            if axis >= inputs[name].ndim:
                raise ExportError(f"{flag}: the input has shape {list(inputs[name].shape)}")
            size = inputs[name].shape[axis]
            if size < EXAMPLE_ROWS:
                raise ExportError(
                    f"{flag}: the example is {size} long there; torch takes that for a constant"
                )
            if sizes.setdefault(symbol, size) != size:
                raise ExportError(f"{flag}: the example is {size} long there, elsewhere {sizes[symbol]}")


def _outputs(text: str, served: ServedModule, tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Run the example, twice: names of the outputs."""
    first, second = (_answers(text, served, tensors) for _ in range(2))
    for name, answer in first.items():
        if answer.ndim == 0 or len(answer) != EXAMPLE_ROWS:
            raise ExportError(
                f"{text}: output {name!r} has shape {list(answer.shape)} for {EXAMPLE_ROWS} rows; expected "
                "the rows along axis 0 of every output"
            )
        if answer.is_complex():
            raise ExportError(f"{text}: output {name!r} is complex; return torch.view_as_real of it")
        if not torch.allclose(answer.double(), second[name].double(), **SAME, equal_nan=True):
            raise ExportError(
                f"{text}: output {name!r} differs from one run to the next; forward draws random numbers or "
                "changes the module's state"
            )
    taken = [name for name in first if name in tensors]
    return tuple(f"{name}_output" if name in taken else name for name in first)


def _answers(text: str, served: ServedModule, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        with torch.no_grad():
            return served.named_outputs(*(tensor.clone() for tensor in tensors.values()))
    except ExportError as error:
        raise ExportError(f"{text}: {error}") from error
    except Exception as error:
        place = place_of(error)
        where = f" at {place}" if place else ""
        raise ExportError(
            f"{text}: the module doesn't run on its own example{where}: {summary(error)}"
        ) from error
