"""Why a network can't become a graph, in a sentence that says where and what to do.

torch.export names the cause in its own terms (a guard, a symbol, a pass) and puts the line of the user's code
far below; this finds the line and says which change helps.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sysconfig
import textwrap
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TORCH = Path(torch.__file__).parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
# Whose lines nobody can change to help: the tracer, its callers, and this package.
TRACERS = (TORCH, SITE_PACKAGES / "onnxscript", SITE_PACKAGES / "onnx_ir", Path(__file__).parent)
SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"

OPERATOR = re.compile(r"OpOverload\(op='(aten\.)?(?P<name>[\w.]+)'")
FROZEN = re.compile(
    r"inferred a static shape of (?P<size>\d+) for dimension inputs\['(?P<name>.+)'\]\.shape\[(?P<axis>\d+)"
)
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
GUARD_PLACE = re.compile(r"(?P<file>[\w./-]+\.py):(?P<line>\d+) in ")


@contextlib.contextmanager
def recorded_guards() -> Iterator[list[str]]:
    """Collect what torch decides about sizes while it traces, instead of printing it.

    It knows which line fixed a dynamic axis only at that moment; the error that it ends in doesn't say.
    """
    logger = logging.getLogger(SYMBOLIC_SHAPES)
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    record = _Record()
    logger.handlers, logger.propagate = [record], False
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # the graph so far, printed by torch.export as it fails
            yield record.guards
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


class _Record(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.guards: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "[guard added]" in (message := record.getMessage()):
            self.guards.append(message)


def explain(error: BaseException, guards: Sequence[str] = ()) -> str:
    """Say what torch.onnx.export stumbled over.

    Args:
        error: what it raised.
        guards: of the same run, from `recorded_guards`.
    """
    causes = _causes(error)
    innermost = causes[-1]
    if isinstance(innermost, ExportError):
        return str(innermost)
    place = next((found for cause in reversed(causes) if (found := place_of(cause))), "")
    text = str(innermost)
    if type(innermost).__name__ == "GuardOnDataDependentSymNode":
        return _data_dependent(place)
    if frozen := FROZEN.search(text):
        return _frozen_axis(frozen["name"], frozen["axis"], frozen["size"], guards)
    if operator := OPERATOR.search(text):
        return _unknown_operator(operator["name"], place)
    known = [advice for sign, advice in ADVICE.items() if sign in text]
    where = f" at {place}" if place else ""
    return "; ".join([f"tracing the network failed{where}: {summary(innermost)}", *known[:1]])


# What torch says to what helps.
ADVICE = {
    "ScriptObject": "TorchScript can't be traced again: give the Python module",
    "positional arguments but": "a part of TorchScript can't be traced again: give its Python module",
    "not supported in this export path": "express it by other operators, or leave this step to the client",
    "FakeTensor": "forward may use torch's operators only, on inputs, parameters and buffers; make a "
    "constant a buffer (register_buffer)",
    "Attempted to mutate": "forward may change neither its inputs nor the module; work on a clone",
}


def summary(error: BaseException) -> str:
    """An error's class and its text on one line."""
    text = textwrap.shorten(str(error), 300, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException, *, libraries: bool = True) -> str:
    """The deepest line of code that isn't the tracer's, as "file:line (`code`)"; "" where there is none.

    Args:
        error: one that was raised.
        libraries: whether a line of an installed package counts.
    """
    for node in _nodes(error):
        places = [
            found for found in FRAME.findall(node.stack_trace or "") if _is_users(found[0], libraries=True)
        ]
        if places:
            return ":".join(places[-1])
    stack = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in stack if _is_users(frame.filename, libraries=libraries)]
    if not frames:
        return ""
    code = f" (`{frames[-1].line}`)" if frames[-1].line else ""
    return f"{frames[-1].filename}:{frames[-1].lineno}{code}"


def _is_users(file: str, *, libraries: bool) -> bool:
    path = Path(file)
    if file.startswith("<") or any(path.is_relative_to(folder) for folder in TRACERS):
        return False
    if path.is_relative_to(SITE_PACKAGES):  # which the standard library's folder may hold
        return libraries
    return not path.is_relative_to(STANDARD_LIBRARY)


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return causes


def _nodes(error: BaseException) -> list[torch.fx.Node]:
    """The node of torch's graph that the translator was at: only its local variables have it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [node for frame in frames if isinstance(node := frame.f_locals.get("node"), torch.fx.Node)]


def _data_dependent(place: str) -> str:
    return (
        f"forward decides in Python by what a tensor holds, at {place or 'an unknown line'}; a graph has "
        "one path for all inputs: choose values by torch.where(condition, a, b), or branches by "
        "torch.cond(condition, if_true, if_false, inputs), loop a fixed number of times, or leave the "
        "decision to the client"
    )


def _frozen_axis(name: str, axis: str, size: str, guards: Sequence[str]) -> str:
    place = next(
        (found for guard in guards if f", {size})" in guard and (found := _place_of_guard(guard))), ""
    )
    where = f" at {place}" if place else ""
    return (
        f"input {name!r}: axis {axis} should be dynamic, but forward fixes it to the example's "
        f"{size}{where}; look for a loop over the axis, its size compared with or replaced by a number, or a "
        "tensor of that size; write it as one operation over the whole axis, with sizes from tensor.shape"
    )


def _place_of_guard(guard: str) -> str:
    """Torch gives its own files relative to its folder, and others with their beginning cut off."""
    for match in GUARD_PLACE.finditer(guard):
        file = Path(match["file"])
        own = file.parent.name == Path(__file__).parent.name and (Path(__file__).parent / file.name).exists()
        if not (TORCH / file).exists() and not own:
            return f"{file.name}:{match['line']}"
    return ""


def _unknown_operator(name: str, place: str) -> str:
    where = f" (at {place})" if place else ""
    return (
        f"torch's operator {name.removesuffix('.default')} has no translation to ONNX{where}; express it "
        "by other operators, or leave this step to the client: return what goes into it"
    )
