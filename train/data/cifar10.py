"""CIFAR-10: 60 000 colour images of animals and vehicles, 32 x 32.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009, and the format
described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from train.data.download import DataError, cache_folder, fetch, verify
from train.data.images import ImageData

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
TARBALL = "cifar-10-python.tar.gz"
TARBALL_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
MOSAIC_LABELS = "labels.npz"
MOSAIC_SHA256 = {
    "data_batch_1.webp": "300ffcf194c8f61c75b8c5953a174409b8330fab73d07248898f6ccada5e7cca",
    "data_batch_2.webp": "4515f0ede7ffd142fddb4729acfdf1fb65d12870990ad8b1965ac4a373033807",
    "data_batch_3.webp": "7aae7d19f0a73bff547175b943476119a8c8095bc79ac54aab0df64c8d71c719",
    "data_batch_4.webp": "e1efb601e48cbadc2a04109457693df681bf3c45a20b535e0f0a94312fff80e5",
    "data_batch_5.webp": "c8e9792848a0a5278c0b1a0061ed5a9075aba417cd48cc0fe9ba6f4d3da9cfa4",
    "test_batch.webp": "b3c946666f1bd5f3d0836a282e2755dbb4192a4f7382116ee2a4139d456731b7",
    MOSAIC_LABELS: "100457827cb30b2869dbdce3761c5279714820de9a8c6fa4d0dcc7cbc3037527",
}
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
SIDE = 32
TILES = 100
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Splits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def load_folder(folder: Path) -> ImageData:
    """Read the canonical tarball, or the same images as lossless WebP mosaics, a third smaller.

    A mosaic `data_batch_1.webp` ... `test_batch.webp` shows a batch's 10 000 images as 100 x 100 tiles in row
    order; `labels.npz` has all labels as "train" and "test".

    Returns:
        Images UINT8 [50000, 32, 32, 3] and [10000, 32, 32, 3].

    Raises:
        DataError: a file is missing, damaged or unreadable.
    """
    if (folder / TARBALL).exists() or not (folder / MOSAIC_LABELS).exists():
        verify(folder / TARBALL, TARBALL_SHA256)
        return ImageData("cifar10", LABELS, *read_tarball(folder / TARBALL))
    for name, digest in MOSAIC_SHA256.items():
        verify(folder / name, digest)
    return ImageData("cifar10", LABELS, *_read_mosaics(folder))


def load_download() -> ImageData:
    """Download the tarball into the cache folder if it is not there yet, then `load_folder`.

    Raises:
        DataError: the file can't be fetched.
    """
    folder = cache_folder() / "cifar10"
    fetch(URL, folder / TARBALL, TARBALL_SHA256)
    return load_folder(folder)


def read_tarball(path: Path) -> Splits:
    """Read the "CIFAR-10 python version": one pickle per batch.

    Returns:
        Train images UINT8 [n, 32, 32, 3] and labels INT64 [n], test images UINT8 [m, 32, 32, 3] and labels
        INT64 [m].

    Raises:
        DataError: not a tarball, a batch is missing, or a pickle holds anything but the arrays of a batch.
    """
    batches = []
    try:
        with tarfile.open(path, "r:gz") as archive:
            for name in (*TRAIN_BATCHES, TEST_BATCH):
                member = archive.extractfile(f"cifar-10-batches-py/{name}")
                if member is None:
                    raise DataError(f"{path}: {name} is not a file")
                batches.append(_read_batch(member.read(), f"{path}: {name}"))
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(f"{path}: can't be read as the CIFAR-10 tarball: {error}") from error
    *train, (test_images, test_labels) = batches
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return images, labels, test_images, test_labels


class BatchUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and refuses every other class or function."""

    ALLOWED: ClassVar[Mapping[tuple[str, str], Any]] = {
        # What numpy itself names there: the module has moved between numpy 1 and 2, the batches have not.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that a pickle names.

        Raises:
            pickle.UnpicklingError: a batch does not need it.
        """
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a batch")
        return self.ALLOWED[module, name]


def _read_batch(data: bytes, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Images UINT8 [n, 32, 32, 3] and labels INT64 [n] of one pickled batch."""
    try:
        # The batches were written by Python 2, whose strings are bytes.
        batch = BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        planes = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, SIDE, SIDE)
        labels = np.asarray(batch[b"labels"], np.int64)
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{title} can't be read as a CIFAR-10 batch: {error}") from error
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _read_mosaics(folder: Path) -> Splits:
    train = np.concatenate([_read_mosaic(folder / f"{name}.webp") for name in TRAIN_BATCHES])
    try:
        with np.load(folder / MOSAIC_LABELS, allow_pickle=False) as labels:
            splits = labels["train"].astype(np.int64), labels["test"].astype(np.int64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder / MOSAIC_LABELS}: can't be read: {error}") from error
    return train, splits[0], _read_mosaic(folder / f"{TEST_BATCH}.webp"), splits[1]


def _read_mosaic(path: Path) -> np.ndarray:
    """UINT8 [10000, 32, 32, 3]."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        tiles = pixels.reshape(TILES, SIDE, TILES, SIDE, 3)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as a mosaic of {TILES} x {TILES} images: {error}") from error
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3, 4)).reshape(-1, SIDE, SIDE, 3)
