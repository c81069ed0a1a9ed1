"""Rows to run two graphs on: real ones where there are some, else random ones."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

from export.errors import ExportError
from export.inspection.signature import input_values, symbols

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from export.inspection.signature import Tensor
    from export.inspection.trace import Value

ROWS = 16
# Integers may be tokens, types, lengths or truth values: which range a graph takes is tried.
RANGES = (100, 8, 2, 1)
WORDS = ("a", "is", "the", "good", "7")


@dataclass(frozen=True)
class Samples:
    """Input name to array, where they are from, and whether that is a file."""

    arrays: Mapping[str, np.ndarray]
    source: str
    stored: bool = False


def stored_samples(file: Path) -> Samples:
    """Inputs of an `.npz` file: arrays called input.NAME where there are some, else all.

    Raises:
        ExportError: it is no such file.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            marked = [name for name in stored.files if name.startswith("input.")]
            arrays = {name.removeprefix("input."): stored[name] for name in marked or stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ExportError(f"{file}: not an .npz file of arrays: {error}") from error
    return Samples({name: _as_text(array) for name, array in arrays.items()}, str(file), stored=True)


def _as_text(array: np.ndarray) -> np.ndarray:
    return array.astype(object) if array.dtype.kind == "U" else array


def candidates(
    sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    stored: Sequence[Path],
    sizes: Mapping[str, int] | None,
) -> Iterator[Samples]:
    """What two graphs could be run on, best first.

    Args:
        sides: both graphs' inputs.
        stored: `.npz` files to look into, those that are there.
        sizes: symbolic axis to size in random rows, 1 for those left out; None for no random rows.

    Raises:
        ExportError: a file can't be read, or there can be no random rows.
    """
    for file in dict.fromkeys(stored):
        if sizes is None or file.is_file():
            yield stored_samples(file)
    if sizes is not None:
        union = _union(*sides)
        names = {name for tensor in union for name in symbols(tensor).values()}
        yield from random_samples(union, {name: sizes.get(name, 1) for name in names})


def _union(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of both graphs by name; where one fixes an axis, it is fixed."""
    found = {tensor.name: tensor for tensor in first}
    for tensor in second:
        before = found.setdefault(tensor.name, tensor)
        if before.shape is not None and tensor.shape is not None and len(before.shape) == len(tensor.shape):
            axes = zip(before.shape, tensor.shape, strict=True)
            shape = tuple(b if isinstance(a, str) else a for a, b in axes)
            found[tensor.name] = replace(before, shape=shape)
    return list(found.values())


def random_samples(inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> Iterator[Samples]:
    """Random rows for the inputs, one after another with smaller integers.

    Args:
        inputs: of both graphs, each name once.
        sizes: symbolic axis to size; the first axis gets 16 where it is symbolic in all inputs.

    Raises:
        ExportError: an input is no tensor of known rank and type.
    """
    for tensor in inputs:
        if tensor.shape is None or np_type(tensor) is None:
            raise ExportError(
                f"input {tensor.name!r} is {tensor.type}, without known axes: name rows by --inputs"
            )
    if is_batched(inputs):
        sizes = {**sizes, **{symbols(tensor)[0]: ROWS for tensor in inputs}}
    values = input_values(inputs, sizes)
    has_integers = any(np.dtype(np_type(tensor)).kind in "iu" for tensor in inputs)
    for high in RANGES if has_integers else RANGES[:1]:
        generator = np.random.default_rng(0)
        arrays = {name: _random(generator, value, high) for name, value in values.items()}
        yield Samples(arrays, "random rows" + (f" (integers below {high})" if has_integers else ""))


def is_batched(inputs: Sequence[Tensor]) -> bool:
    """Whether the first axis of every input has a free size."""
    return bool(inputs) and all(0 in symbols(tensor) for tensor in inputs)


def np_type(tensor: Tensor) -> np.dtype | None:
    """Numpy's type of an input; None where numpy or onnxruntime's binding has none."""
    if tensor.type == "STRING":
        return np.dtype(object)
    number = dict(TensorProto.DataType.items()).get(tensor.type)
    found = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)) if number else None
    return found if found is not None and found.kind in "biuf" else None


def fit(arrays: Mapping[str, np.ndarray], inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The arrays that a graph wants, in its types where only the width differs.

    Raises:
        ExportError: one is missing, or has another type or number of axes.
    """
    fitted = {}
    for tensor in inputs:
        array, wanted = arrays.get(tensor.name), np_type(tensor)
        if array is None:
            raise ExportError(f"no rows for input {tensor.name!r}, only for {', '.join(arrays) or 'none'}")
        kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b", "O": "O"}.get(wanted.kind if wanted else "", "")
        if array.dtype.kind not in kinds or array.ndim != len(tensor.shape or ()):
            rows = f"{array.dtype} {list(array.shape)}"
            raise ExportError(f"input {tensor.name!r} is {tensor}, the rows are {rows}")
        fitted[tensor.name] = array.astype(wanted)
    return fitted


def _random(generator: np.random.Generator, value: Value, high: int) -> np.ndarray:
    if value.type == "STRING":
        return generator.choice(np.array(WORDS, object), value.shape)
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dict(TensorProto.DataType.items())[value.type]))
    if kind.kind == "f":
        return generator.standard_normal(value.shape).astype(kind)
    return generator.integers(0, 2 if kind.kind == "b" else high, value.shape).astype(kind)
