"""Running text to model, whatever file it comes from."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from train.data.download import DataError

TEXT_DATA_SETS = ("tinyshakespeare", "file")
TRAIN_FRACTION = 0.9
"""nanoGPT's split of tinyshakespeare: what is the test split here is what it calls validation."""
VALIDATION_FRACTION = 0.05


@dataclass(frozen=True)
class TextData:
    """One text, split where nine tenths of its characters end.

    Attributes:
        name: the data set's name; "file NAME" for a text file.
        train: the first part; its beginning is held out to choose the best epoch, see `hold_out`.
        test: the rest.
    """

    name: str
    train: str
    test: str

    def sha256(self) -> str:
        """Sha256 of both splits' UTF-8 bytes."""
        digest = hashlib.sha256()
        for text in (self.train, self.test):
            content = text.encode()
            digest.update(f"{len(content)} bytes".encode())
            digest.update(content)
        return digest.hexdigest()


def load_text_data(name: str, *, data_dir: Path | None, text_file: str = "") -> TextData:
    """Load a text.

    Args:
        name: one of `TEXT_DATA_SETS`.
        data_dir: folder with the canonical file, or with a folder of the data set's name that has it; None
            takes the checkout's copy. Not looked at for "file".
        text_file: path of the UTF-8 text, for "file".

    Raises:
        ValueError: there is no such data set.
        DataError: the file is missing, damaged or not UTF-8.
    """
    if name not in TEXT_DATA_SETS:
        raise ValueError(f"data set {name!r} is not one of {', '.join(TEXT_DATA_SETS)}")
    if name == "file":
        return load_text_file(Path(text_file))
    module = importlib.import_module(f"train.data.{name}")
    if data_dir is None:
        return cast("TextData", module.load_sample())
    folder = data_dir / name if (data_dir / name).is_dir() else data_dir
    return cast("TextData", module.load_folder(folder))


def load_text_file(path: Path) -> TextData:
    """Read any UTF-8 text file; line ends and all other characters stay as they are.

    Raises:
        DataError: the file can't be read, or isn't UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error}; --text-file names a text file") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert the file, with iconv for example"
        ) from error
    return split_text(f"file {path.name}", text)


def split_text(name: str, text: str) -> TextData:
    """Split where nine tenths of the characters end."""
    end = int(TRAIN_FRACTION * len(text))
    return TextData(name, text[:end], text[end:])


def hold_out(train: str) -> tuple[str, str]:
    """Split a train text into the part to fit and its first twentieth, to validate on.

    Not its last: the play that the test split begins in the middle of begins there, and whoever is compared
    with has read it.
    """
    start = round(VALIDATION_FRACTION * len(train))
    return train[start:], train[:start]
