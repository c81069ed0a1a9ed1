"""The idx format of MNIST and the data sets that copied it.

Y. LeCun, "The MNIST database of handwritten digits", section "File formats": a big-endian header with a magic
number (zero, zero, element type, number of dimensions) and one 32-bit size per dimension, then the elements.
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from train.data.download import DataError, verify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"

UNSIGNED_BYTE = 8
MAX_BYTES = 1 << 30


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, compressed with gzip, or with xz if its name ends so.

    Returns:
        UINT8 of the shape that the header gives.

    Raises:
        DataError: the file is not compressed so, not idx of unsigned bytes, over 1 GiB, or shorter or longer
            than its header says.
    """
    try:
        with lzma.open(path) if path.suffix == ".xz" else gzip.open(path) as stream:
            zero, kind, dimensions = struct.unpack(">HBB", stream.read(4))
            if (zero, kind) != (0, UNSIGNED_BYTE):
                raise DataError(f"{path}: expected idx with unsigned bytes, found magic {zero:04x}{kind:02x}")
            shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise DataError(f"{path}: the header {list(shape)} asks for more than {MAX_BYTES} bytes")
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, struct.error) as error:
        raise DataError(f"{path}: can't be read as compressed idx: {error}") from error
    if len(data) != size:
        raise DataError(
            f"{path}: the header {list(shape)} asks for {size} bytes, the file has other {len(data)}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape).copy()  # torch wants writable memory


def read_splits(
    folder: Path, sha256: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Check and read a data set's four idx files.

    Args:
        folder: holds the four files.
        sha256: file name to hexadecimal digest, in the order of what is returned.

    Returns:
        Train images UINT8 [n, h, w, 1], train labels INT64 [n], test images UINT8 [m, h, w, 1], test labels
        INT64 [m].

    Raises:
        DataError: a file is missing, damaged or unreadable.
    """
    arrays = []
    for name, digest in sha256.items():
        verify(folder / name, digest)
        array = read_idx(folder / name)
        arrays.append(array[..., np.newaxis] if "images" in name else array.astype(np.int64))
    train_images, train_labels, test_images, test_labels = arrays
    return train_images, train_labels, test_images, test_labels
