"""Multivariate time series, whatever data set they come from."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from train.data.download import DataError

SERIES_DATA_SETS = ("etth1", "etth2", "csv")
TRAIN_FRACTION, VALIDATION_FRACTION = 0.7, 0.1  # of a CSV's rows; the rest is the test split

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class SeriesData:
    """Rows at equal distances in time, cut into three splits that follow one another.

    Attributes:
        name: the data set's name.
        columns: what each column is called.
        values: FLOAT32 [rows, columns] in the data's own units.
        validation_start: the first row after the train split.
        test_start: the first row after the validation split.
        test_end: the first row after the test split; those from there on are unused.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    validation_start: int
    test_start: int
    test_end: int

    def __post_init__(self) -> None:
        """Check that columns, values and borders belong together.

        Raises:
            ValueError: the values have another shape or type, or the borders are out of order.
        """
        if self.values.dtype != np.float32 or self.values.shape[1:] != (len(self.columns),):
            raise ValueError(
                f"{self.name}: expected FLOAT32 [rows, {len(self.columns)}], "
                f"got {self.values.dtype} {list(self.values.shape)}"
            )
        borders = (0, self.validation_start, self.test_start, self.test_end, len(self.values))
        if list(borders) != sorted(borders):
            raise ValueError(f"{self.name}: the splits' borders {borders} are out of order")

    def sha256(self) -> str:
        """Sha256 of all rows and of the splits' borders, the same for every file format they came in."""
        borders = (self.validation_start, self.test_start, self.test_end)
        digest = hashlib.sha256(f"{self.values.dtype.str}{self.values.shape}{borders}".encode())
        digest.update(np.ascontiguousarray(self.values).data)
        return digest.hexdigest()

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the train rows alone, FLOAT32 [columns] each; a column that never changes has std 1."""
        rows = self.values[: self.validation_start].astype(np.float64)
        std = rows.std(axis=0)
        return rows.mean(axis=0).astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)

    def window_starts(self, split: Split, context: int, horizon: int) -> np.ndarray:
        """First rows of all windows whose horizon lies in a split, INT64 [n].

        A window is `context` rows to look back at and the `horizon` rows after them. As in the benchmark, the
        look-back of the first windows to validate and to test on reaches into the split before; no horizon
        does.

        Raises:
            DataError: the split is too short for a single window.
        """
        first, end = {
            "train": (0, self.validation_start),
            "validation": (self.validation_start - context, self.test_start),
            "test": (self.test_start - context, self.test_end),
        }[split]
        starts = np.arange(first, end - context - horizon + 1)
        if first < 0 or not len(starts):
            raise DataError(
                f"{self.name}: the {split} split is too short for a window of --context {context} rows "
                f"and --horizon {horizon} after them; shorten them or bring more than {len(self.values)} rows"
            )
        return starts


def load_series_data(
    name: str, *, data_dir: Path | None, sample: bool, csv_file: str = "", time_column: str = ""
) -> SeriesData:
    """Load a data set from the first of its sources that the caller named.

    Args:
        name: one of `SERIES_DATA_SETS`.
        data_dir: folder with the original files, or with a folder "ett" that has them; for "csv" the file.
        sample: use the repository's copy where `data_dir` is None; otherwise download.
        csv_file: for "csv" the file's path, where `data_dir` is None.
        time_column: for "csv" the column to leave out; "" is the first.

    Raises:
        ValueError: there is no such data set.
        DataError: a file is missing or damaged, or can't be fetched, or a cell is not a number.
    """
    if name not in SERIES_DATA_SETS:
        raise ValueError(f"data set {name!r} is not one of {', '.join(SERIES_DATA_SETS)}")
    if name == "csv":
        if data_dir is None and not csv_file:
            raise DataError("--data csv: name the file with --csv")
        return load_csv(data_dir or Path(csv_file), time_column)
    from train.data import ett  # noqa: PLC0415 - it imports this module

    if data_dir is not None:
        return ett.load_folder(name, data_dir / "ett" if (data_dir / "ett").is_dir() else data_dir)
    return ett.load_sample(name) if sample else ett.load_download(name)


def load_csv(path: Path, time_column: str) -> SeriesData:
    """Read any CSV file, its rows in order of time; the first 70 % to train, 10 % to validate, 20 % to test.

    Raises:
        DataError: the file is missing, or `read_csv` refuses it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data csv reads the one that --csv or --data-dir names")
    columns, values = read_csv(path.read_bytes(), str(path), time_column)
    validation_start = round(len(values) * TRAIN_FRACTION)
    test_start = round(len(values) * (TRAIN_FRACTION + VALIDATION_FRACTION))
    return SeriesData(path.stem, columns, values, validation_start, test_start, test_end=len(values))


def read_csv(content: bytes, name: str, time_column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Read a comma-separated table: a line of column names, then a line per point in time.

    Args:
        content: UTF-8 text.
        name: what to call the file in messages.
        time_column: the column to leave out; "" is the first.

    Returns:
        The other columns' names, and FLOAT32 [rows, columns].

    Raises:
        DataError: a cell is missing or no finite number, or there is no such column, or no row.
    """
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header = next(reader, [])
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name}: expected comma-separated UTF-8 text: {error}") from error
    time_column = time_column or next(iter(header), "")
    if time_column not in header:
        raise DataError(f"{name}: no time column {time_column!r} among {', '.join(header) or 'no columns'}")
    left_out = header.index(time_column)
    columns = tuple(column for index, column in enumerate(header) if index != left_out)
    if not columns or not lines:
        raise DataError(
            f"{name}: expected a time column, at least one other and a row; "
            f"got columns {', '.join(header)} and {len(lines)} rows"
        )
    rows = [_numbers(cells, header, left_out, f"{name}, line {line}") for line, cells in lines]
    return columns, np.array(rows, dtype=np.float32)


def _numbers(cells: list[str], header: list[str], left_out: int, where: str) -> list[float]:
    if len(cells) != len(header):
        missing = f"; column {header[len(cells)]!r} is missing" if len(cells) < len(header) else ""
        raise DataError(f"{where}: expected {len(header)} cells, got {len(cells)}{missing}")
    numbers = []
    for index, (column, cell) in enumerate(zip(header, cells, strict=True)):
        if index == left_out:
            continue
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{where}, column {column!r}: expected a finite number, got {cell!r}; mend the file"
            )
        numbers.append(number)
    return numbers
