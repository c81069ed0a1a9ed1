"""Any torch module as one that takes and returns plain tensors, with a name for each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
HALF = {torch.float16, torch.bfloat16}
WRAP = "wrap the network in a module whose forward returns tensors, or a dict of them"


class ServedModule(nn.Module):
    """Calls a module with its inputs by position or by name; returns a tuple of its output tensors.

    Args:
        module: the network.
        inputs: names of the tensors that `forward` takes.
        by_name: whether they are `forward`'s parameters and passed as such.
        reading: input name to what its tensor goes through first.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[str], reading: Mapping[str, nn.Module], *, by_name: bool
    ) -> None:
        super().__init__()
        self.module = module
        self.reading = nn.ModuleList(reading.get(name, nn.Identity()) for name in inputs)
        self._inputs, self._by_name = tuple(inputs), by_name

        def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.named_outputs(*tensors).values())

        # torch.export reads the inputs' names, and which axes are whose, from the signature.
        names = [name if name.isidentifier() else f"input_{index}" for index, name in enumerate(inputs)]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions may
        self.forward = forward

    def named_outputs(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs by name; see `tensors_by_name`."""
        tensors = tuple(read(tensor) for read, tensor in zip(self.reading, tensors, strict=True))
        if self._by_name:
            return tensors_by_name(self.module(**dict(zip(self._inputs, tensors, strict=True))))
        return tensors_by_name(self.module(*tensors))


def serve_module(
    module: nn.Module, inputs: Sequence[str], reading: Mapping[str, nn.Module], *, named: bool
) -> ServedModule:
    """Find out how `forward` wants its inputs.

    Args:
        module: the network.
        inputs: names of its inputs, in order.
        reading: input name to what its tensor goes through first.
        named: whether the names were given, not taken from `forward`.

    Raises:
        ExportError: some of the names are parameters of `forward` and others aren't.
    """
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    matching = [name for name in inputs if name in parameters]
    if not named or not (matching or takes_any):  # then they are names for the tensors as they come
        return ServedModule(module, inputs, reading, by_name=False)
    if len(matching) < len(inputs) and not takes_any:
        strange = ", ".join(repr(name) for name in inputs if name not in parameters)
        takes = ", ".join(parameters)
        raise ExportError(f"inputs {strange}: forward takes {takes}; name the inputs as it does")
    return ServedModule(module, inputs, reading, by_name=True)


def positional_names(module: nn.Module, count: int) -> list[str]:
    """Names for inputs that are given by position: those of `forward`'s parameters.

    Raises:
        ExportError: it takes fewer.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in POSITIONAL]
    rest = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
    if rest:
        names += [f"{rest[0]}_{index}" for index in range(count - len(names))]
    if len(names) < count:
        raise ExportError(f"{count} inputs, but {type(module).__name__}.forward takes {len(names)}: {names}")
    return names[:count]


def tensors_by_name(result: Any) -> dict[str, torch.Tensor]:
    """A module's result as tensors with names: its keys or fields, else output, or output_0, output_1, ...

    What is None is left out.

    Raises:
        ExportError: it holds something else than tensors.
    """
    if isinstance(result, torch.Tensor):
        return {"output": result}
    found = {name: value for name, value in _items(result) if value is not None}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise ExportError(
                f"forward's output {name!r} is a {type(value).__name__}, expected a tensor; {WRAP}"
            )
    if not found:
        raise ExportError(f"forward returned an empty {type(result).__name__}; {WRAP}")
    return found


def _items(result: Any) -> list[tuple[str, Any]]:
    if isinstance(result, Mapping):  # Hugging Face's outputs are dataclasses too
        return [(str(name), value) for name, value in result.items()]
    if hasattr(result, "_fields"):
        return list(zip(result._fields, result, strict=True))
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return [(field.name, getattr(result, field.name)) for field in dataclasses.fields(result)]
    if isinstance(result, tuple | list):
        return [(f"output_{index}", value) for index, value in enumerate(result)]
    raise ExportError(f"forward returned a {type(result).__name__}, expected tensors; {WRAP}")


def prepare(module: nn.Module, say: Callable[[str], None]) -> nn.Module:
    """Bring a module where and into the form in which it is served: evaluation mode, CPU, FP32.

    Args:
        module: changed in place.
        say: called with a note on each change.

    Returns:
        The module, without what torch.compile or a parallel trainer wrapped around it.

    Raises:
        ExportError: it is TorchScript, or its weights aren't loaded.
    """
    module = _unwrapped(module)
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise ExportError(f"{name} is TorchScript, which can't be traced; return its Python module")
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ExportError(f"{name} is on the meta device and has no weights; load them")
    if any(part.training for part in module.modules()):
        say(f"note: {name} was in training mode; set to evaluation (dropout off, batch norm by its averages)")
    if any(tensor.device.type != "cpu" for tensor in tensors):
        say(f"note: {name} was on {tensors[0].device}; moved to the CPU")
    types = {tensor.dtype for tensor in tensors}
    wide = {parameter.dtype for parameter in module.parameters()} & {torch.float64}
    if odd := types & HALF | wide:
        say(f"note: {name} has {', '.join(sorted(map(str, odd)))} weights; made float32")
        module = module.float()
    return module.cpu().eval().requires_grad_(requires_grad=False)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", None)  # torch.compile's
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module
