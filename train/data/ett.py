"""ETT: two years of hourly loads and oil temperature of two electricity transformers.

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting", AAAI 2021,
arXiv:2012.07436; https://github.com/zhouhaoyi/ETDataset, CC BY-ND 4.0.
"""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

from train.data.download import DataError, cache_folder, fetch
from train.data.series import SeriesData, read_csv

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
FILES = {"etth1": "ETTh1.csv", "etth2": "ETTh2.csv"}
SHA256 = {
    "etth1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "etth2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
}
REPOSITORY_COPY = Path(__file__).parent / "samples" / "ett"
MONTH = 30 * 24  # hours; the benchmark's months all have 30 days


def load_folder(name: str, folder: Path) -> SeriesData:
    """Read ETTh1.csv or ETTh2.csv, plain or with .xz; FLOAT32 [17420, 7].

    The benchmark trains on 12 months, validates on the next 4 and tests on 4 more; the rest is left unused.

    Raises:
        DataError: the file is missing or damaged.
    """
    content = read_verified(folder / FILES[name], SHA256[name])
    columns, values = read_csv(content, FILES[name], time_column="date")
    return SeriesData(
        name, columns, values, validation_start=12 * MONTH, test_start=16 * MONTH, test_end=20 * MONTH
    )


def load_download(name: str) -> SeriesData:
    """Download the file into the cache folder if it is not there yet, then `load_folder`.

    Raises:
        DataError: the file can't be fetched.
    """
    folder = cache_folder() / "ett"
    fetch(URL + FILES[name], folder / FILES[name], SHA256[name])
    return load_folder(name, folder)


def load_sample(name: str) -> SeriesData:
    """Read the repository's copy, which is the whole file; of ETTh1 only.

    Raises:
        DataError: it is ETTh2, or the checkout's copy is damaged.
    """
    if name != "etth1":
        raise DataError(f"{name} has no offline copy; name its folder with --data-dir, or use --no-sample")
    return load_folder(name, REPOSITORY_COPY)


def read_verified(path: Path, sha256: str) -> bytes:
    """The content of `path`, or of `path`.xz decompressed.

    Raises:
        DataError: neither is there, or the content has another sha256.
    """
    packed = path.with_name(path.name + ".xz")
    try:
        content = path.read_bytes() if path.is_file() else lzma.decompress(packed.read_bytes())
    except OSError:
        raise DataError(
            f"{path}: no such file, with .xz neither; --data-dir names the folder with the data set's files"
        ) from None
    except lzma.LZMAError as error:
        raise DataError(f"{packed}: damaged: {error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path}: damaged or another file: sha256 {found}, expected {sha256}")
    return content
