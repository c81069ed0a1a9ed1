"""Golden samples: does a graph compute here what the original network computed where it was exported?

A version's `golden.npz` holds rows of inputs, the original's outputs, and for each graph file how far its
outputs were off: arrays `input.NAME`, `output.NAME` and `tolerance.FILE.NAME`. They are run on the providers
that were chosen: one that computes something else (a driver's bug, a precision that it chose by itself) is
found before a client is answered.
"""

from __future__ import annotations

import contextlib
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError, ServeError
from serve.loading.checksums import GOLDEN
from serve.runtime.providers import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from serve.model.model_config import ModelConfig
    from serve.runtime.session import Session

    Arrays = Mapping[str, np.ndarray]

MAX_BYTES = 256 << 20
"""Of a golden file's arrays; the exporter writes 4 MiB at most."""

# Of an output's largest number, beside the tolerance, which was measured on one machine. Another processor
# adds up in another order: 2e-5 in float32.
ROUNDING = 1e-4
# Accelerators multiply float32 in 10 or 11 bits (TF32, FP16) by their own choice, 5e-4 a product.
ACCELERATOR_ROUNDING = 5e-3

_BFLOAT16 = "tensor(bfloat16)"


@dataclass(frozen=True, slots=True)
class Golden:
    """What a check found.

    Attributes:
        rows: how many were run.
        differences: output name to the largest absolute difference from the original.
        allowed: output name to the largest that would have passed.
    """

    rows: int
    differences: Mapping[str, float]
    allowed: Mapping[str, float]


def check(session: Session, config: ModelConfig, version_folder: Path, filename: str) -> Golden | None:
    """Run a version's golden samples.

    One row at a time, so that this doesn't decide how much memory the session keeps for its largest batch.

    Args:
        session: the loaded graph; samples are what the graph takes, pixels where clients send image files.
        config: names the model.
        version_folder: where `golden.npz` is, or is not.
        filename: the graph's.

    Returns:
        what was found; None where there are no samples, or no tolerance for this graph file.

    Raises:
        ModelLoadError: an output is off by more than the tolerance, or the samples can't be read or run.
    """
    path = version_folder / GOLDEN
    if not path.is_file():
        return None
    with _opened(path) as arrays:
        outputs = [
            output.name
            for output in session.outputs
            if f"tolerance.{filename}.{output.name}" in arrays and f"output.{output.name}" in arrays
        ]
        if not outputs:
            return None
        inputs = _inputs(arrays)
        expected = {name: arrays[f"output.{name}"] for name in outputs}
        tolerances = {name: float(arrays[f"tolerance.{filename}.{name}"]) for name in outputs}
    rows = _check_arrays(session, inputs, expected)
    differences, largest = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    size = _fixed_rows(session) or 1
    for start in range(0, rows - size + 1, size):
        part = {name: array[start : start + size] for name, array in inputs.items()}
        for name, found in zip(outputs, _run(session, part, outputs, config.name), strict=True):
            off, most = _difference(session, name, found, expected[name][start : start + size])
            differences[name], largest[name] = max(differences[name], off), max(largest[name], most)
    rounding = ROUNDING if set(session.providers) <= {CPU} else ACCELERATOR_ROUNDING
    allowed = {name: tolerances[name] + rounding * largest[name] for name in outputs}
    for name in outputs:
        if not differences[name] <= allowed[name]:
            raise ModelLoadError(_failure(session, filename, name, differences[name], allowed[name]))
    return Golden(rows, differences, allowed)


def read_inputs(version_folder: Path) -> dict[str, np.ndarray]:
    """The golden rows of each input, as the graph takes them; empty where there are none.

    Raises:
        ModelLoadError: the file can't be read.
    """
    path = version_folder / GOLDEN
    if not path.is_file():
        return {}
    with _opened(path) as arrays:
        return _inputs(arrays)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Arrays]:
    """The file's arrays, read one by one as they are asked for.

    Raises:
        ModelLoadError: within the context too, when an array can't be read.
    """
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except ModelLoadError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever damaged bytes make them stumble over
        raise ModelLoadError(
            f"{GOLDEN} can't be read ({error or type(error).__name__}): {_ADVICE}"
        ) from error


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_BYTES:
        raise ModelLoadError(f"{GOLDEN} holds {size} bytes, the limit is {MAX_BYTES}: {_ADVICE}")


_ADVICE = f"export the model again, or remove {GOLDEN} to serve it unchecked"


def _inputs(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name.removeprefix("input."): _text(arrays[name]) for name in arrays if name.startswith("input.")}


def _text(array: np.ndarray) -> np.ndarray:
    """Text as onnxruntime takes it, objects of `str`; everything else as it is."""
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    return array.astype(object) if array.dtype.kind == "U" else array


def _check_arrays(session: Session, inputs: Arrays, expected: Arrays) -> int:
    """How many rows there are.

    Raises:
        ModelLoadError: the samples are not of this graph, or have no rows.
    """
    names = {tensor.name for tensor in session.inputs}
    if inputs.keys() != names:
        raise ModelLoadError(
            f"{GOLDEN} has the inputs {sorted(inputs)}, the graph takes {sorted(names)}: {_ADVICE}"
        )
    rows = {len(array) if array.ndim else 0 for array in (*inputs.values(), *expected.values())}
    if len(rows) != 1 or 0 in rows:
        raise ModelLoadError(
            f"{GOLDEN} has arrays of {sorted(rows)} rows, expected as many in each: {_ADVICE}"
        )
    return rows.pop()


def _fixed_rows(session: Session) -> int:
    """Rows of every run where the graph fixes them; 0 where it doesn't."""
    first = {tensor.shape[0] if tensor.shape else -1 for tensor in session.inputs}
    return max(0, *first)


def _run(session: Session, inputs: Arrays, outputs: list[str], model: str) -> list[np.ndarray]:
    try:
        return session.run(inputs, outputs)
    except ServeError as error:
        raise ModelLoadError(
            f"model '{model}': {GOLDEN} can't be run on {', '.join(session.providers)}: {error}; {_ADVICE}"
        ) from error


def _difference(session: Session, name: str, found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest absolute difference, and the largest number expected. Text differs by 1 or not at all."""
    found = np.asarray(found)
    if found.shape != expected.shape:
        raise ModelLoadError(
            f"{GOLDEN}: output '{name}' has shape {list(expected.shape)}, the graph on "
            f"{', '.join(session.providers)} answers {list(found.shape)}: {_ADVICE}"
        )
    if not found.size:
        return 0.0, 0.0
    if any(array.dtype.kind not in "biuf" for array in (found, expected)):
        return float((found.astype(str) != expected.astype(str)).any()), 0.0
    if any(output.name == name and output.onnx_type == _BFLOAT16 for output in session.outputs):
        found, expected = _from_bfloat16(found), _from_bfloat16(expected)
    first, second = found.astype(np.float64), expected.astype(np.float64)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(first - second))
    off[np.isnan(off)] = np.inf
    return float(off.max()), float(np.abs(second[np.isfinite(second)]).max(initial=0.0))


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
    """Numbers from the bits that numpy has no type for; anything but UINT16 as it is."""
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def _failure(session: Session, filename: str, output: str, off: float, allowed: float) -> str:
    return (
        f"{GOLDEN}: output '{output}' of {filename} is off by {off:.3g} on {', '.join(session.providers)}, "
        f"allowed {allowed:.3g}: this provider computes something else than what was exported; take another "
        "(instance_group.kind KIND_CPU) or another precision (default_model_filename), or export the model "
        "again for this device"
    )
