"""SST-2, the Stanford sentiment treebank's sentences without the neutral ones: 9 613 of film reviews.

Socher et al., "Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank", EMNLP 2013.
These are the whole sentences of the treebank's own split, not GLUE's 67 349 phrases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from train.data.download import DataError
from train.data.sentences import SentenceData, read_lines, split_columns

if TYPE_CHECKING:
    from pathlib import Path

SHA256 = {
    "train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
    "test.tsv": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
    "dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
}
LABELS = ("negative", "positive")


def load_folder(folder: Path) -> SentenceData:
    """Read the three files of "text TAB label"; 6 920 sentences to train on, 872 to validate, 1 821 to test.

    Raises:
        DataError: a file is missing or damaged.
    """
    splits: list[tuple[str, ...] | np.ndarray] = []
    for name, digest in SHA256.items():
        rows = split_columns(read_lines(folder, name, digest), 2, name)
        splits.append(tuple(text for text, _ in rows))
        splits.append(np.array([int(label) for _, label in rows], np.int64))
    return SentenceData("sst2", LABELS, *splits)  # type: ignore[arg-type]  # texts and labels alternate


def load_download() -> NoReturn:
    """Refuse: no address is known that serves the sentences of the treebank's own split as such.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"sst2 has no canonical download address; name the folder with {', '.join(SHA256)} with --data-dir"
    )
