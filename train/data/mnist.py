"""MNIST: 70 000 grey images of handwritten digits, 28 x 28.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 86(11),
1998.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.data.download import cache_folder, fetch
from train.data.idx import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, read_splits
from train.data.images import ImageData

if TYPE_CHECKING:
    from pathlib import Path

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = {
    TRAIN_IMAGES: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    TRAIN_LABELS: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    TEST_IMAGES: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    TEST_LABELS: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
LABELS = tuple("0123456789")


def load_folder(folder: Path) -> ImageData:
    """Read the four canonical files; UINT8 images [60000, 28, 28, 1] and [10000, 28, 28, 1].

    Raises:
        DataError: a file is missing or damaged.
    """
    return ImageData("mnist", LABELS, *read_splits(folder, SHA256), flip_keeps_label=False)


def load_download() -> ImageData:
    """Download into the cache folder what is not there yet, then `load_folder`.

    Raises:
        DataError: a file can't be fetched.
    """
    folder = cache_folder() / "mnist"
    for name, digest in SHA256.items():
        fetch(URL + name, folder / name, digest)
    return load_folder(folder)
