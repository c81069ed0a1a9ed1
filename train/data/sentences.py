"""Labelled sentences, whatever data set they come from."""

from __future__ import annotations

import hashlib
import importlib
import lzma
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from train.data.download import DataError

if TYPE_CHECKING:
    from pathlib import Path

SentenceDataSet = Literal["nsmc", "sst2"]
MAX_BYTES = 1 << 28


def _no_labels() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class SentenceData:
    """One data set as its authors split it.

    Attributes:
        name: the data set's name, with "(sample)" after it for an offline sample.
        labels: class names in index order.
        train_texts: n texts, as they were written.
        train_labels: INT64 [n], indices into `labels`.
        test_texts: m texts.
        test_labels: INT64 [m].
        validation_texts: k texts where the authors held some out of training; empty where they didn't.
        validation_labels: INT64 [k].
    """

    name: str
    labels: tuple[str, ...]
    train_texts: tuple[str, ...]
    train_labels: np.ndarray
    test_texts: tuple[str, ...]
    test_labels: np.ndarray
    validation_texts: tuple[str, ...] = ()
    validation_labels: np.ndarray = field(default_factory=_no_labels)

    def __post_init__(self) -> None:
        """Check that texts and labels belong together.

        Raises:
            ValueError: a split has labels of another number or type, or a label without a class.
        """
        for split in ("train", "test", "validation"):
            texts, labels = getattr(self, f"{split}_texts"), getattr(self, f"{split}_labels")
            if labels.dtype != np.int64 or labels.shape != (len(texts),):
                raise ValueError(
                    f"{self.name} {split}: expected INT64 labels [{len(texts)}], one per text, "
                    f"got {labels.dtype} {list(labels.shape)}"
                )
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.labels):
                raise ValueError(f"{self.name} {split}: a label is outside the {len(self.labels)} classes")

    def sha256(self) -> str:
        """Sha256 of all rows, the same for every file format the data set came in."""
        digest = hashlib.sha256()
        for split in ("train", "test", "validation"):
            for text in getattr(self, f"{split}_texts"):
                content = text.encode()
                digest.update(f"{len(content)}:".encode() + content)
            digest.update(getattr(self, f"{split}_labels").tobytes())
        return digest.hexdigest()


def load_sentence_data(name: str, *, data_dir: Path | None, sample: bool) -> SentenceData:
    """Load a data set from the first of three sources that the caller named.

    Args:
        name: one of `SentenceDataSet`.
        data_dir: folder with the canonical files, or with a folder of the data set's name that has them.
        sample: use the small offline sample where `data_dir` is None; otherwise download.

    Raises:
        ValueError: there is no such data set.
        DataError: it has no offline sample, or a file is missing or damaged, or can't be fetched.
    """
    if name not in get_args(SentenceDataSet):
        raise ValueError(f"data set {name!r} is not one of {', '.join(get_args(SentenceDataSet))}")
    module = importlib.import_module(f"train.data.{name}")
    if data_dir is not None:
        folder = data_dir / name if (data_dir / name).is_dir() else data_dir
        return cast("SentenceData", module.load_folder(folder))
    if not sample:
        return cast("SentenceData", module.load_download())
    if not hasattr(module, "load_sample"):
        raise DataError(f"{name} has no offline sample; name its folder with --data-dir")
    return cast("SentenceData", module.load_sample())


def read_lines(folder: Path, name: str, sha256: str) -> list[str]:
    """Read a text file, or the same compressed with xz and ".xz" after its name.

    Args:
        folder: holds the file.
        name: the file's name without ".xz".
        sha256: hexadecimal digest of the text, not of the compressed file.

    Returns:
        Its lines without their ends. Only a line feed ends a line: reviews hold other line separators.

    Raises:
        DataError: the file is missing, can't be decompressed, is over 256 MiB or has another sha256.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.xz"
    if not path.is_file():
        raise DataError(
            f"{folder}: holds neither {name} nor {name}.xz; "
            "--data-dir names the folder with the data set's files"
        )
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: can't be read: {error}; fetch the file again") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: expected at most {MAX_BYTES} bytes, got more; it is another file")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{path}: damaged or another file: sha256 of the text {found}, expected {sha256}")
    return content.decode().removesuffix("\n").split("\n")


def split_columns(lines: list[str], columns: int, source: str, *, first_line: int = 1) -> list[list[str]]:
    """Split lines at tabs.

    Args:
        lines: without their ends.
        columns: how many every line has.
        source: what to call the file in a complaint.
        first_line: number of the first of `lines` in that file.

    Raises:
        DataError: a line has more or fewer columns, or its last one is not "0" or "1"; the message has its
            number.
    """
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=first_line):
        if len(row) != columns:
            raise DataError(
                f"{source}, line {number}: expected {columns} columns between tabs, got {len(row)}; "
                "use the original file"
            )
        if row[-1] not in ("0", "1"):
            raise DataError(
                f"{source}, line {number}: expected label 0 or 1 in the last column, got {row[-1]!r}; "
                "use the original file"
            )
    return rows
