"""Fashion-MNIST: 70 000 grey images of clothing, 28 x 28.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747. MIT licence, Zalando SE.
"""

from __future__ import annotations

from pathlib import Path

from train.data.download import cache_folder, fetch
from train.data.idx import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, read_splits
from train.data.images import ImageData

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHA256 = {
    TRAIN_IMAGES: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    TRAIN_LABELS: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    TEST_IMAGES: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    TEST_LABELS: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
SAMPLE = Path(__file__).parent / "samples" / "fashion_mnist"
SAMPLE_SHA256 = {
    "train-images-idx3-ubyte.xz": "1ff695495318b1b55f481e853ce6f0abfb9991dddc34abb56c114361882771c2",
    "train-labels-idx1-ubyte.xz": "6d2b4ef13f479fbb4691ca5a3b0cebf11619c153722bd21852dd10a67c529a28",
    "t10k-images-idx3-ubyte.xz": "d6e49bf99ef2fa54980c1b0578e6b381528a8a3f8b177fda43794aef67bfbfd9",
    "t10k-labels-idx1-ubyte.xz": "95f9bd84433fec940e7be3ddc5199b6d01c2b5675f6bcb2befb4f65148765df5",
}
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_folder(folder: Path) -> ImageData:
    """Read the four canonical files; UINT8 images [60000, 28, 28, 1] and [10000, 28, 28, 1].

    Raises:
        DataError: a file is missing or damaged.
    """
    return ImageData("fashion_mnist", LABELS, *read_splits(folder, SHA256))


def load_download() -> ImageData:
    """Download into the cache folder what is not there yet, then `load_folder`.

    Raises:
        DataError: a file can't be fetched.
    """
    folder = cache_folder() / "fashion_mnist"
    for name, digest in SHA256.items():
        fetch(URL + name, folder / name, digest)
    return load_folder(folder)


def load_sample() -> ImageData:
    """Read the offline sample; UINT8 images [4400, 28, 28, 1] and [3500, 28, 28, 1].

    Raises:
        DataError: the checkout's copy is damaged.
    """
    return ImageData("fashion_mnist (sample)", LABELS, *read_splits(SAMPLE, SAMPLE_SHA256))
