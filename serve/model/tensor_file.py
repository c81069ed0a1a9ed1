"""Files that hold one tensor's raw data as on the wire: warm-up samples, initial states."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, ModelLoadError
from serve.protocol.tensor_codec import as_text, decode_tensor

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from serve.protocol.datatypes import DataType

MAX_BYTES = 1 << 30
"""Of one tensor; a config may come over the wire."""


def read_file(what: str, folder: Path, filename: str, most: int = MAX_BYTES) -> bytes:
    """The first bytes of a file.

    Args:
        what: names the field of the config that names the file.
        folder: below the model's; the file must lie in it.
        filename: relative to `folder`.
        most: how many bytes at most; Triton, too, takes the first ones of a file that is too long.

    Raises:
        ModelLoadError: there is no such file in the folder.
    """
    root = folder.resolve()
    path = (root / filename).resolve()
    if not (root.is_relative_to(folder.parent.resolve()) and path.is_relative_to(root) and path.is_file()):
        raise ModelLoadError(f"{what} is {filename!r}, expected a file in the folder {folder.name}/")
    with path.open("rb") as stream:
        return stream.read(most)


def read_tensor(
    what: str, folder: Path, filename: str, datatype: DataType, shape: tuple[int, ...]
) -> np.ndarray:
    """A file's tensor as onnxruntime takes it.

    Raises:
        ModelLoadError: see `read_file`; or it holds too little, or no such tensor.
    """
    expected = math.prod(shape) * datatype.itemsize
    data = read_file(what, folder, filename, expected if datatype.itemsize else MAX_BYTES)
    if len(data) < expected:
        raise ModelLoadError(f"{what}: {filename} has {len(data)} bytes, expected {expected}")
    try:
        array = decode_tensor(filename, datatype, shape, data)
        return array if datatype.itemsize else as_text(array)
    except (InvalidArgumentError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{what}: {error}") from error
