"""NSMC, the Naver sentiment movie corpus: 200 000 film reviews in Korean, half of them negative.

Lucy Park, https://github.com/e9t/nsmc. CC0 1.0. Each review has at most 140 characters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data.download import DataError, cache_folder, fetch
from train.data.sentences import SentenceData, read_lines, split_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

URL = "https://raw.githubusercontent.com/e9t/nsmc/master/"
TRAIN, TEST = "ratings_train.txt", "ratings_test.txt"
SHA256 = {
    TRAIN: "e03b7d14e9e41be8d464a28057cd25d7396c53e67aa7fd5f7e552c59b0ee2940",
    TEST: "8ac9f64052f11dbf6ae0acb5e038f03d90a76f0eda7820cfb3a92d02edfcebda",
}
SAMPLE = Path(__file__).parent / "samples" / "nsmc"
SAMPLE_SHA256 = {
    TRAIN: "0a9700416ee886fb6343778939794943d85adf15f44e611f41d6e5bc9bd2eb87",
    TEST: "aefdbe1c50f75de6e100e952794cebb23fae8a3dde3db64f096f9c5b82372a3e",
}
HEADER = "id\tdocument\tlabel"
LABELS = ("negative", "positive")


def load_folder(folder: Path) -> SentenceData:
    """Read the two canonical files; 149 995 reviews to train on and 50 000 to test with.

    Five of the 150 000 rows for training have no text and teach nothing: they are left out. The three of the
    test split stay in it, as empty texts, so that figures compare with those of others.

    Raises:
        DataError: a file is missing or damaged.
    """
    return _read(folder, "nsmc", SHA256)


def load_download() -> SentenceData:
    """Download into the cache folder what is not there yet, then `load_folder`.

    Raises:
        DataError: a file can't be fetched.
    """
    folder = cache_folder() / "nsmc"
    for name, digest in SHA256.items():
        fetch(URL + name, folder / name, digest)
    return load_folder(folder)


def load_sample() -> SentenceData:
    """Read the offline sample; 16 000 reviews to train on and 4 000 to test with.

    Raises:
        DataError: the checkout's copy is damaged.
    """
    return _read(SAMPLE, "nsmc (sample)", SAMPLE_SHA256)


def parse(lines: list[str], source: str) -> list[tuple[str, int]]:
    """Text and label of each row after the header.

    Raises:
        DataError: the header or a row is not as in the canonical files; the message has the line's number.
    """
    if lines[0] != HEADER:
        raise DataError(f"{source}, line 1: expected the header {HEADER!r}, got {lines[0]!r}")
    rows = split_columns(lines[1:], 3, source, first_line=2)
    return [(text, int(label)) for _, text, label in rows]


def _read(folder: Path, title: str, sha256: Mapping[str, str]) -> SentenceData:
    train, test = (parse(read_lines(folder, name, digest), name) for name, digest in sha256.items())
    train = [row for row in train if row[0].strip()]
    return SentenceData(
        title,
        LABELS,
        tuple(text for text, _ in train),
        np.array([label for _, label in train], np.int64),
        tuple(text for text, _ in test),
        np.array([label for _, label in test], np.int64),
    )
