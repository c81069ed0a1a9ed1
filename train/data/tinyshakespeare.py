"""Tinyshakespeare: a megabyte of Shakespeare's plays, put together by Andrej Karpathy for char-rnn (2015).

The checkout has the whole data set, so nothing is ever downloaded. The text is in the public domain.
"""

from __future__ import annotations

from pathlib import Path

from train.data.download import verify
from train.data.text import TextData, split_text

FILE = "input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SAMPLE = Path(__file__).parent / "samples" / "tinyshakespeare"


def load_folder(folder: Path) -> TextData:
    """Read `input.txt`; 1 003 854 characters to train on and 111 540 to test.

    Raises:
        DataError: the file is missing or damaged.
    """
    verify(folder / FILE, SHA256)
    return split_text("tinyshakespeare", (folder / FILE).read_bytes().decode("ascii"))


def load_sample() -> TextData:
    """Read the checkout's copy, which is the whole data set; see `load_folder`.

    Raises:
        DataError: the copy is damaged.
    """
    return load_folder(SAMPLE)
