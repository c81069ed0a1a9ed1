import dataclasses
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from train.data import ett
from train.data.download import DataError
from train.data.series import SPLITS, SeriesData, Split, load_series_data
from train.dlinear import fit_dlinear
from train.forecasting import Windows, make_windows, mean_errors, repeat_last

CSV = "time,load,heat\n0,1.5,2\n1,2.5,2\n2,3.5,2\n3,4.5,2\n4,5.5,2\n"


def etth1() -> SeriesData:
    return load_series_data("etth1", data_dir=None, sample=True)


def load_csv(path: Path, text: str, time_column: str = "") -> SeriesData:
    path.write_text(text, encoding="utf-8")
    return load_series_data("csv", data_dir=None, sample=False, csv_file=str(path), time_column=time_column)


def test_etth1_is_whole_and_split_as_the_benchmark_does() -> None:
    data = etth1()
    assert data.columns == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    assert data.values.shape == (17420, 7)
    assert data.values.dtype == np.float32
    assert data.values[0, -1] == np.float32(30.5310001373291)  # the file's first line
    assert (data.validation_start, data.test_start, data.test_end) == (8640, 11520, 14400)


def test_repeating_the_last_value_gives_the_published_errors() -> None:
    # "Repeat" of Zeng et al., table 2, 96 to 96 rows: it pins splits, scaling and windows at once.
    windows = make_windows(etth1(), "test", context=96, horizon=96)
    assert len(windows) == 2785
    errors = mean_errors(lambda look_back: repeat_last(look_back, 96), windows)
    assert errors == {"mse": pytest.approx(1.295, abs=0.005), "mae": pytest.approx(0.713, abs=0.005)}


@pytest.mark.parametrize(("context", "horizon"), [(96, 96), (336, 24)])
def test_every_row_is_forecast_in_its_own_split_only(context: int, horizon: int) -> None:
    data = etth1()
    borders = [context, data.validation_start, data.test_start, data.test_end]
    for split, first, end in zip(SPLITS, borders, borders[1:], strict=False):
        starts = data.window_starts(split, context, horizon)
        assert starts[0] + context == first
        assert starts[-1] + context + horizon == end
        assert np.array_equal(np.diff(starts), np.ones(len(starts) - 1))


def test_scaling_knows_the_train_rows_only() -> None:
    data = etth1()
    later = data.values.copy()
    later[data.validation_start :] *= 100
    changed = dataclasses.replace(data, values=later)
    for before, after in zip(data.mean_and_std(), changed.mean_and_std(), strict=True):
        assert np.array_equal(before, after)
    assert changed.sha256() != data.sha256()
    rows = make_windows(data, "train", 96, 96).values[: data.validation_start]
    assert torch.allclose(rows.mean(0), torch.zeros(7), atol=1e-4)
    assert torch.allclose(rows.std(0), torch.ones(7), atol=1e-3)


def test_dlinear_is_far_better_than_the_last_value_and_leaves_no_trace_in_torch() -> None:
    data = etth1()
    train, validation, test = (make_windows(data, split, 96, 96) for split in SPLITS)
    some = Windows(train.values, train.starts[::8], 96, 96)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    model = fit_dlinear(some, Windows(validation.values, validation.starts[::8], 96, 96), seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert mean_errors(model, test)["mse"] < 0.5


def test_the_original_files_equal_the_repositorys_copy(real_data: Path) -> None:
    assert load_series_data("etth1", data_dir=real_data, sample=False).sha256() == etth1().sha256()
    other = load_series_data("etth2", data_dir=real_data / "ett", sample=False)
    assert other.values.shape == (17420, 7)
    assert other.sha256() != etth1().sha256()


def test_a_folder_may_hold_the_plain_or_the_packed_file(tmp_path: Path) -> None:
    packed = (ett.REPOSITORY_COPY / "ETTh1.csv.xz").read_bytes()
    (tmp_path / "ETTh1.csv").write_bytes(lzma.decompress(packed))
    assert load_series_data("etth1", data_dir=tmp_path, sample=True).sha256() == etth1().sha256()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("ETTh1.csv", b"date,OT\n0,1\n", "damaged or another file: sha256"),
        ("ETTh1.csv.xz", lzma.compress(b"date,OT\n0,1\n"), "damaged or another file: sha256"),
        ("ETTh1.csv.xz", lzma.compress(b"date,OT\n0,1\n")[:-9], "damaged: "),
        ("ETTh1.csv.xz", b"no xz", "damaged: "),
        ("ETTh2.csv", b"", r"ETTh1.csv: no such file"),
    ],
)
def test_a_file_that_is_not_the_data_set_is_refused(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_series_data("etth1", data_dir=tmp_path, sample=False)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="etth2 has no offline copy"):
        load_series_data("etth2", data_dir=None, sample=True)
    with pytest.raises(ValueError, match="data set 'ettm1' is not one of etth1, etth2, csv"):
        load_series_data("ettm1", data_dir=None, sample=True)
    with pytest.raises(DataError, match="name the file with --csv"):
        load_series_data("csv", data_dir=None, sample=True)


def test_any_csv_can_be_read(tmp_path: Path) -> None:
    data = load_csv(tmp_path / "boiler.csv", "\ufeff" + CSV + "\n" + "5,6.5,2\n6,7,2\n7,8,2\n8,9,2\n9,10,2\n")
    assert (data.name, data.columns) == ("boiler", ("load", "heat"))
    assert data.values[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.0, 8.0, 9.0, 10.0]
    assert (data.validation_start, data.test_start, data.test_end) == (7, 8, 10)
    assert data.mean_and_std()[1][1] == 1  # of a column that never changes
    same = load_series_data("csv", data_dir=tmp_path / "boiler.csv", sample=False)
    assert same.sha256() == data.sha256()


def test_the_time_column_may_be_any(tmp_path: Path) -> None:
    data = load_csv(tmp_path / "a.csv", "load,when\n1,noon\n2,night\n", time_column="when")
    assert (data.columns, data.values.tolist()) == (("load",), [[1.0], [2.0]])


@pytest.mark.parametrize(
    ("text", "time_column", "complaint"),
    [
        (CSV + "5,,2\n", "", "a.csv, line 7, column 'load': expected a finite number, got ''"),
        (CSV + "5,1,n/a\n", "", "a.csv, line 7, column 'heat': expected a finite number, got 'n/a'"),
        (CSV + "\n5,1,NaN\n", "", "a.csv, line 8, column 'heat': expected a finite number, got 'NaN'"),
        (CSV + "5,1\n", "", "a.csv, line 7: expected 3 cells, got 2; column 'heat' is missing"),
        (CSV + "5,1,2,3\n", "", "a.csv, line 7: expected 3 cells, got 4"),
        (CSV, "date", "a.csv: no time column 'date' among time, load, heat"),
        ("time\n0\n", "", "expected a time column, at least one other and a row"),
        ("time,load\n", "", "expected a time column, at least one other and a row"),
        ("", "", "no time column '' among no columns"),
    ],
)
def test_a_csv_with_a_gap_is_refused_by_line_and_column(
    tmp_path: Path, text: str, time_column: str, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        load_csv(tmp_path / "a.csv", text, time_column)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.csv: expected comma-separated UTF-8 text"):
        load_series_data("csv", data_dir=tmp_path / "a.csv", sample=False)


@pytest.mark.parametrize("split", SPLITS)
def test_a_series_shorter_than_a_window_is_refused(tmp_path: Path, split: Split) -> None:
    data = load_csv(tmp_path / "a.csv", CSV)
    with pytest.raises(DataError, match=f"the {split} split is too short for a window of --context 4 rows"):
        data.window_starts(split, context=4, horizon=2)


def test_borders_and_types_must_fit() -> None:
    values = np.zeros((4, 1), np.float32)
    with pytest.raises(ValueError, match="out of order"):
        SeriesData("a", ("x",), values, 3, 2, 4)
    with pytest.raises(ValueError, match=r"expected FLOAT32 \[rows, 2\], got float32 \[4, 1\]"):
        SeriesData("a", ("x", "y"), values, 1, 2, 3)
