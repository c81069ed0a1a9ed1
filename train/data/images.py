"""Labelled images, whatever data set they come from."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from train.data.download import DataError

if TYPE_CHECKING:
    from pathlib import Path

ImageDataSet = Literal["fashion_mnist", "mnist", "cifar10", "folder"]


@dataclass(frozen=True)
class ImageData:
    """One data set as its authors split it.

    Attributes:
        name: the data set's name, with "(sample)" after it for an offline sample.
        labels: class names in index order.
        train_images: UINT8 [n, height, width, channels].
        train_labels: INT64 [n], indices into `labels`.
        test_images: UINT8 [m, height, width, channels].
        test_labels: INT64 [m].
        flip_keeps_label: an image mirrored left to right is of the same class.
    """

    name: str
    labels: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    flip_keeps_label: bool = True

    def __post_init__(self) -> None:
        """Check that images and labels belong together.

        Raises:
            ValueError: a split has other shapes or types, or a label without a class.
        """
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:  # noqa: PLR2004 - NHWC
                raise ValueError(
                    f"{self.name} {split}: expected UINT8 [n, h, w, c] with n labels, "
                    f"got {images.dtype} {list(images.shape)} with labels {list(labels.shape)}"
                )
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.labels):
                raise ValueError(f"{self.name} {split}: a label is outside the {len(self.labels)} classes")

    def sha256(self) -> str:
        """Sha256 of all rows, the same for every file format the data set came in."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_image_data(name: str, *, data_dir: Path | None, sample: bool, image_size: int = 224) -> ImageData:
    """Load a data set from the first of three sources that the caller named.

    Args:
        name: one of `ImageDataSet`.
        data_dir: folder with the canonical files, or with a folder of the data set's name that has them; of
            "folder", a folder of images per class, see `train.data.image_folder`.
        sample: use the small offline sample where `data_dir` is None; otherwise download.
        image_size: of "folder": pixels a side; the others have a size of their own.

    Raises:
        ValueError: there is no such data set.
        DataError: it has no offline sample, or a file is missing or damaged, or can't be fetched.
    """
    if name not in get_args(ImageDataSet):
        raise ValueError(f"data set {name!r} is not one of {', '.join(get_args(ImageDataSet))}")
    if name == "folder":
        if data_dir is None:
            raise DataError("--data folder: name the folder with a folder of images per class: --data-dir")
        image_folder = importlib.import_module("train.data.image_folder")
        return cast("ImageData", image_folder.load_folder(data_dir, image_size))
    module = importlib.import_module(f"train.data.{name}")
    if data_dir is not None:
        folder = data_dir / name if (data_dir / name).is_dir() else data_dir
        return cast("ImageData", module.load_folder(folder))
    if not sample:
        return cast("ImageData", module.load_download())
    if not hasattr(module, "load_sample"):
        raise DataError(f"{name} has no offline sample; name its folder with --data-dir or use --no-sample")
    return cast("ImageData", module.load_sample())
