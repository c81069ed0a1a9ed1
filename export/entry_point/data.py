"""Rows to calibrate and judge a network with that brings no data set: its example, or an `.npz` file."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from export.entry_point.agreement import accuracy, agreement
from export.entry_point.pixels import parse_scaling
from export.errors import ExportError
from export.original import require_finite, run_module
from export.session import rows, take
from train.family import ServingData

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from export.entry_point.agreement import MetricName
    from export.entry_point.pixels import Scaling
    from train.family import Metric

    Arrays = Mapping[str, np.ndarray]

ENOUGH_TO_CALIBRATE = 32
OTHER_ROWS = 8
TARGETS = "targets"
# The name may hold colons itself ("input:0" does), so the axis is the last number before "=".
DYNAMIC = re.compile(r"(?P<input>.+):(?P<axis>-?\d+)=(?P<name>\w+)")


@dataclass(frozen=True)
class EntryPointOptions:
    """What the command line adds to a function that returns a network.

    Attributes:
        dynamic_axes: input name to {axis: symbolic name}, besides the batch's.
        rows: input name to array [n, ...], the first half to calibrate with and the second to judge by; None
            takes the example's. "targets", unless an input is called so, has class indices INT [n].
        labels: class names in index order.
        metric: how to judge without targets; None chooses by the output, see `serving_data`.
        pixels: how the network's images are normalized, to give it an input of pixels; None leaves it alone.
    """

    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    rows: Arrays | None = None
    labels: tuple[str, ...] = ()
    metric: MetricName | None = None
    pixels: Scaling | None = None

    @classmethod
    def parse(
        cls,
        dynamic: Sequence[str],
        *,
        data: Path | None = None,
        labels: Path | None = None,
        metric: MetricName | None = None,
        pixels: str | None = None,
    ) -> EntryPointOptions:
        """Read the flags and the files that they name.

        Raises:
            ExportError: a flag or a file isn't as expected, or can't be read.
        """
        return cls(
            dynamic_axes=parse_dynamic(dynamic),
            rows=read_rows(data) if data else None,
            labels=read_labels(labels) if labels else (),
            metric=metric,
            pixels=parse_scaling(pixels) if pixels else None,
        )

    def flags(self) -> list[str]:
        """Those that were given."""
        given = {
            "--dynamic": self.dynamic_axes,
            "--data": self.rows is not None,
            "--labels": self.labels,
            "--metric": self.metric,
            "--pixels": self.pixels,
        }
        return [flag for flag, value in given.items() if value]


def parse_dynamic(words: Sequence[str]) -> dict[str, dict[int, str]]:
    """The axes that `--dynamic INPUT:AXIS=NAME` names.

    Raises:
        ExportError: one is not of this form, or says something else than another.
    """
    axes: dict[str, dict[int, str]] = {}
    for word in words:
        match = DYNAMIC.fullmatch(word)
        if match is None:
            raise ExportError(f"--dynamic {word}: expected INPUT:AXIS=NAME, input_ids:1=time for example")
        axis, name = int(match["axis"]), match["name"]
        if axis < 1 or name == "batch":
            raise ExportError(
                f"--dynamic {word}: axis 0 is the batch and always dynamic; name axes from 1 on"
            )
        if axes.setdefault(match["input"], {}).setdefault(axis, name) != name:
            raise ExportError(f"--dynamic {word}: the axis was called {axes[match['input']][axis]!r} before")
    return axes


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names, one a line.

    Raises:
        ExportError: a line is empty, or the file isn't UTF-8 or can't be read.
    """
    try:
        labels = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ExportError(f"--labels {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ExportError(
            f"--labels {path}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    if not labels or not all(label.strip() for label in labels):
        number = next((n for n, label in enumerate(labels, 1) if not label.strip()), 1)
        raise ExportError(f"--labels {path}: line {number} is empty; expected one class name a line")
    return tuple(label.strip() for label in labels)


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file.

    Raises:
        ExportError: it is no such file, or can't be read.
    """
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            raise ExportError(f"--data {path}: holds one array without a name; write it with np.savez")
        with stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        why = f" ({error})" if isinstance(error, zipfile.BadZipFile) else ""  # else how to unpickle it
        raise ExportError(
            f"--data {path}: is no .npz file of plain arrays; expected arrays [rows, ...] by input name, as "
            f"numpy.savez writes them{why}"
        ) from error
    except OSError as error:
        raise ExportError(f"--data {path}: {error.strerror or error}") from error


def serving_data(
    module: nn.Module,
    example: Arrays,
    outputs: Sequence[str],
    options: EntryPointOptions,
) -> tuple[ServingData, Metric]:
    """Rows, and how to judge a graph by them.

    With targets the metric is the accuracy of the first output [n, classes]. Without, it is how far the graph
    agrees with the module: on the best class, where there is such an output; on the numbers, where all are
    integers; else by the cosine between their outputs, the lowest of them.

    Args:
        module: takes `example`'s tensors in order.
        example: input name to array [n, ...], n at least 2.
        outputs: names of the module's outputs.
        options: rows to use instead, labels, dynamic axes.

    Raises:
        ExportError: the rows don't fit the example, or the targets the outputs; the module's outputs aren't
            finite; no other length of a dynamic axis can be run.
    """
    given, targets = _given_rows(example, options)
    count = rows(given)
    half = count // 2 if count >= ENOUGH_TO_CALIBRATE else 0
    held_out = take(given, half, count)
    answers = run_module(module, held_out, outputs)
    require_finite(answers)
    if targets is None:
        metric, expected = agreement(answers, options.metric)
    else:
        metric, expected = accuracy(answers, targets[half:])
    others = other_shapes(module, take(held_out, 0, OTHER_ROWS), outputs, options.dynamic_axes)
    return ServingData(take(given, 0, half), held_out, expected, options.labels, others), metric


def other_shapes(
    module: nn.Module, inputs: Arrays, outputs: Sequence[str], dynamic_axes: Mapping[str, Mapping[int, str]]
) -> tuple[Arrays, ...]:
    """The rows shortened and repeated along each dynamic axis, as far as the module can be run on them.

    Raises:
        ExportError: it can't with any other length of an axis.
    """
    found: list[Arrays] = []
    for name in sorted({name for axes in dynamic_axes.values() for name in axes.values()}):
        along = {
            key: axis for key, axes in dynamic_axes.items() for axis, other in axes.items() if other == name
        }
        key, axis = next(iter(along.items()))
        length = inputs[key].shape[axis]
        candidates = [_resized(inputs, along, size) for size in (max(length // 2, 1), length - 1, 2 * length)]
        runnable = [other for other in candidates if _runs(module, other, outputs)]
        if not runnable:
            raise ExportError(
                f"--dynamic {key}:{axis}={name}: the module runs with {length} there, but with neither half "
                f"as many, one less nor twice as many; {_advice(inputs, along, axis, name)}"
            )
        found += (runnable[0], runnable[-1]) if len(runnable) > 1 else runnable
    return tuple(found)


def _advice(inputs: Arrays, along: Mapping[str, int], axis: int, name: str) -> str:
    """What to do where only some inputs were to change their length."""
    length = next(inputs[key].shape[at] for key, at in along.items())
    alike = [
        key
        for key, array in inputs.items()
        if key not in along and array.ndim > axis and array.shape[axis] == length
    ]
    if not alike:
        return "leave it constant"
    more = " ".join(f"--dynamic {key}:{axis}={name}" for key in alike)
    verb, them = ("are", "them") if len(alike) > 1 else ("is", "it")
    return f"{', '.join(map(repr, alike))} {verb} as long there: name {them} too, {more}"


def _resized(inputs: Arrays, along: Mapping[str, int], size: int) -> Arrays:
    return {
        name: np.take(array, np.arange(size) % array.shape[along[name]], axis=along[name])
        if name in along
        else array
        for name, array in inputs.items()
    }


def _runs(module: nn.Module, inputs: Arrays, outputs: Sequence[str]) -> bool:
    try:
        run_module(module, inputs, outputs)
    except Exception:  # noqa: BLE001 - a foreign module may raise anything
        return False
    return True


def _given_rows(example: Arrays, options: EntryPointOptions) -> tuple[Arrays, np.ndarray | None]:
    if options.rows is None:
        return example, None
    given = dict(options.rows)
    targets = given.pop(TARGETS, None) if TARGETS not in example else None
    if given.keys() != example.keys():
        raise ExportError(
            f"--data holds {', '.join(map(repr, given)) or 'nothing'}, the network takes "
            f"{', '.join(map(repr, example))} (and {TARGETS!r}, class indices, may be there)"
        )
    given = {name: _fit(name, given[name], array, options) for name, array in example.items()}
    count = rows(given)
    if count < 2:  # noqa: PLR2004 - one to calibrate, one to judge
        raise ExportError(f"--data has {count} rows, expected at least 2")
    if targets is not None and (targets.dtype.kind not in "iu" or targets.shape != (count,)):
        raise ExportError(
            f"--data {TARGETS!r} is {targets.dtype} {list(targets.shape)}, expected class indices, "
            f"INT [{count}]"
        )
    return given, targets


def _fit(name: str, found: np.ndarray, example: np.ndarray, options: EntryPointOptions) -> np.ndarray:
    """Rows in the example's type and shape."""
    open_axes = {0, *options.dynamic_axes.get(name, {})}
    expected = [-1 if axis in open_axes else size for axis, size in enumerate(example.shape)]
    if found.ndim != example.ndim or any(
        size not in {-1, given} for size, given in zip(expected, found.shape, strict=True)
    ):
        raise ExportError(f"--data {name!r} has shape {list(found.shape)}, the network takes {expected}")
    cast = found.astype(example.dtype, copy=False)
    same_kind = found.dtype.kind == example.dtype.kind or np.can_cast(found.dtype, example.dtype, "safe")
    if not same_kind or (example.dtype.kind in "iu" and not np.array_equal(cast, found)):
        raise ExportError(
            f"--data {name!r} is {found.dtype}, the network takes {example.dtype}; convert it, or let the "
            "example be of the type that clients send"
        )
    return np.ascontiguousarray(cast)
