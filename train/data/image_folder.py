"""Image classification data as a folder of images per class.

    PATH/train/CLASS/*.png    to learn from
    PATH/test/CLASS/*.png     to test with; PATH/val where there is no test folder

With neither test nor val, or with PATH/CLASS/*.png alone, a fixed fifth of each class becomes the test split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from train.data.download import DataError
from train.data.images import ImageData

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_FOLDERS = ("test", "val")
TEST_FRACTION = 0.2
MAX_BYTES = 4 << 30

Files = list[tuple["Path", int]]
"""Paths and class indices."""


def load_folder(folder: Path, size: int) -> ImageData:
    """Read every image into memory: turned upright, RGB, its shorter side resized to `size`, centre-cropped.

    Args:
        folder: see above; names of classes are the folders' names, sorted.
        size: pixels a side.

    Returns:
        Images UINT8 [n, size, size, 3] and [m, size, size, 3].

    Raises:
        DataError: there are fewer than two classes, a class has too few images, the splits have different
            classes, an image can't be read, or all of them need more than 4 GiB.
    """
    labels, train, test = _splits(folder)
    needed = (len(train) + len(test)) * size * size * 3
    if needed > MAX_BYTES:
        raise DataError(
            f"{folder}: {len(train) + len(test)} images of {size} x {size} need {needed / 2**30:.1f} GiB of "
            f"memory, the limit is {MAX_BYTES >> 30}; lower --image-size or take fewer images"
        )
    arrays = (*_read(train, size), *_read(test, size))
    return ImageData(f"folder {folder.resolve().name}", labels, *arrays)


def _splits(folder: Path) -> tuple[tuple[str, ...], Files, Files]:
    """Class names, training files and test files."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    labels = _classes(root)
    train = _files(root, labels)
    held_out = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()]
    if root == folder or not held_out:
        return labels, *_hold_out(train, labels, root)
    if (found := _classes(held_out[0])) != labels:
        different = ", ".join(sorted(set(found) ^ set(labels)))
        raise DataError(f"{held_out[0]}: expected the classes of {root}; not in both: {different}")
    return labels, train, _files(held_out[0], labels)


def _classes(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data-dir names one with a folder of images per class")
    labels = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."))
    if len(labels) < 2:  # noqa: PLR2004 - one class leaves nothing to tell apart
        raise DataError(f"{root}: expected a folder per class, at least 2, found {len(labels)}")
    return labels


def _files(root: Path, labels: Sequence[str]) -> Files:
    files: Files = []
    for index, label in enumerate(labels):
        paths = sorted(path for path in (root / label).iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{root / label}: no images; expected files named *{', *'.join(SUFFIXES)}")
        files += [(path, index) for path in paths]
    return files


def _hold_out(files: Files, labels: Sequence[str], root: Path) -> tuple[Files, Files]:
    """Training and test files: of each class the same fifth at every call, at least one image."""
    train: Files = []
    test: Files = []
    for index, label in enumerate(labels):
        own = [file for file in files if file[1] == index]
        if len(own) < 2:  # noqa: PLR2004 - one to learn from, one to test with
            raise DataError(f"{root / label}: expected at least 2 images, found {len(own)}")
        order = np.random.default_rng(0).permutation(len(own))
        held_out = max(1, round(TEST_FRACTION * len(own)))
        test += [own[place] for place in sorted(order[:held_out])]
        train += [own[place] for place in sorted(order[held_out:])]
    return train, test


def _read(files: Files, size: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(files), size, size, 3), np.uint8)
    for place, (path, _) in enumerate(files):
        images[place] = _read_image(path, size)
    return images, np.array([index for _, index in files], np.int64)


def _read_image(path: Path, size: int) -> np.ndarray:
    """UINT8 [size, size, 3]."""
    try:
        with Image.open(path) as image:
            upright = _in_8_bits(ImageOps.exif_transpose(image)).convert("RGB")
            cropped = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: can't be read as an image: {error}; repair or remove it") from error
    return np.asarray(cropped)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits, scaled as the server does: Pillow's conversion would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
