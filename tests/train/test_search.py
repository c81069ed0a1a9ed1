import csv
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.__main__ import main
from train.checkpoint import INFO, WEIGHTS, load_info
from train.recipe import Recipe
from train.search_space import Axis, Interval, parse_axes, plan_trials

TINY = shlex.split(
    "search mobilenet --recipe quick --epochs 1 --train-rows 64 --validation-fraction .01 --batch-size 16"
)
WIDTHS = ["--try", "width=0.1,0.2"]


@dataclass(frozen=True, kw_only=True)
class Fields(Recipe):
    """A field of every type that a recipe may have."""

    heads: Annotated[int, ""] = 2
    width: Annotated[float, ""] = 1.0
    flip: Annotated[bool, ""] = True
    pooling: Annotated[Literal["mean", "last"], ""] = "mean"
    split: Annotated[str, ""] = "a"


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("heads=1,2,4", (1, 2, 4)),
        ("heads=1", (1,)),
        ("heads=1,2,1", (1, 2)),
        ("heads=2..5", range(2, 6)),
        ("learning-rate=1e-3, 3e-3", (0.001, 0.003)),
        ("width=0.1..2", Interval(0.1, 2.0)),
        ("flip=true,false", (True, False)),
        ("pooling=last,mean", ("last", "mean")),
        ("split=a,b", ("a", "b")),
    ],
)
def test_values_have_the_type_of_their_field(text: str, axis: Axis) -> None:
    assert list(parse_axes([text], Fields).values()) == [axis]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learning_rat=1", "no field 'learning_rat'; did you mean learning_rate?"),
        ("zzz=1", "no field 'zzz'; --help lists the recipe's fields"),
        ("heads=1,2.5", "--try heads=1,2.5: expected int values, got '2.5'"),
        ("heads", "expected int values, got ''"),
        ("width=a..b", "expected float values, got 'a'"),
        ("width=2..1", "expected a range A..B with A below B"),
        ("width=1..inf", "expected a range A..B with A below B"),
        ("flip=yes", "expected true or false, got 'yes'"),
        ("pooling=max", "expected mean or last, got 'max'"),
        ("pooling=mean..last", "a range needs a field of numbers"),
    ],
)
def test_a_value_that_the_field_cannot_have_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_axes([text], Fields)


def test_a_field_is_given_once() -> None:
    with pytest.raises(ValueError, match="width is given twice"):
        parse_axes(["width=1", "width=2"], Fields)


choices = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(tuple)
wholes = st.tuples(st.integers(-5, 5), st.integers(1, 5)).map(lambda ends: range(ends[0], sum(ends)))
intervals = st.tuples(st.floats(-10, 10), st.floats(0.1, 1e4)).map(lambda ends: Interval(ends[0], sum(ends)))


@given(axes=st.dictionaries(st.sampled_from("abc"), choices, min_size=1))
def test_without_a_count_every_combination_is_tried_once(axes: dict[str, Axis]) -> None:
    trials = plan_trials(axes, None, seed=0)
    combinations = itertools.product(*axes.values())  # type: ignore[arg-type]  # choices only
    assert [tuple(trial.values()) for trial in trials] == list(combinations)
    assert all(list(trial) == list(axes) for trial in trials)


@given(
    axes=st.dictionaries(st.sampled_from("abc"), choices | wholes | intervals, min_size=1),
    count=st.integers(1, 30),
    seed=st.integers(0, 2**63 - 1),
)
def test_draws_are_from_the_axes_and_a_larger_count_begins_with_a_smaller_ones(
    axes: dict[str, Axis], count: int, seed: int
) -> None:
    trials = plan_trials(axes, count, seed)
    assert trials == plan_trials(axes, 30, seed)[:count]
    for trial in trials:
        for name, axis in axes.items():
            if isinstance(axis, Interval):
                assert axis.low <= trial[name] <= axis.high
            else:
                assert trial[name] in axis
    sizes = [math.inf if isinstance(axis, Interval) else len(axis) for axis in axes.values()]
    assert len(trials) == min(count, math.prod(sizes))
    if math.inf not in sizes:
        assert all(one != other for one, other in itertools.combinations(trials, 2))


@pytest.mark.parametrize(("interval", "middle"), [(Interval(1e-4, 1e-2), 1e-3), (Interval(1.0, 3.0), 2.0)])
def test_a_wide_range_is_drawn_from_log_uniformly(interval: Interval, middle: float) -> None:
    drawn = [trial["a"] for trial in plan_trials({"a": interval}, 400, seed=0)]
    below = sum(value < middle for value in drawn)
    assert 160 < below < 240  # four standard deviations around one half
    assert all(len(f"{value:e}".partition("e")[0].strip("0")) <= 5 for value in drawn)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--try widht=1,2", "did you mean width?"),
        ("--try width=0.1..1", "--trials: needed to draw from the range of width"),
        ("--try width=0.1 --trials 0", "--trials: expected at least 1, got 0"),
        ("--try width=0.5,-1", "--width: expected above 0, got -1.0"),
        ("", "the following arguments are required: --try"),
        ("--tri width=1", "--try"),
    ],
)
def test_a_search_that_makes_no_sense_ends_before_it_trains(
    flags: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--out", str(tmp_path / "out"), *shlex.split(flags)])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "search.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_trials_are_ranked_by_validation_and_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, *WIDTHS, "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    found = rows(tmp_path)
    assert [row["rank"] for row in found] == ["1", "2"]
    assert {row["width"] for row in found} == {"0.1", "0.2"}
    figures = [float(row["validation_accuracy"]) for row in found]
    assert figures == sorted(figures, reverse=True)
    for row in found:
        info = load_info(Path(row["checkpoint or failure"]))
        assert str(info.recipe["width"]) == row["width"]
        assert info.metrics["validation_accuracy"] == pytest.approx(
            float(row["validation_accuracy"]), abs=1e-5
        )
    again = next(line for line in printed.splitlines() if line.startswith("the best again: "))
    assert again.startswith("the best again: python -m train mobilenet --recipe quick --")
    assert f"--width {found[0]['width']}" in again
    assert "--epochs 1" in again
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{WEIGHTS}")}
    assert len(written) == 2
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{WEIGHTS}")} == written
    assert rows(tmp_path) == found


def test_a_trial_that_fails_does_not_end_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--try", "learning_rate=1e30,1e-3", "--width", "0.1", "--out", str(tmp_path)]
    assert main([*TINY, *flags]) == 0
    good, bad = rows(tmp_path)
    assert (good["rank"], good["learning_rate"]) == ("1", "0.001")
    assert (bad["rank"], bad["validation_accuracy"]) == ("-", "failed")
    assert "the loss is nan; lower --learning-rate" in bad["checkpoint or failure"]
    assert "the loss is nan" in capsys.readouterr().out


def test_a_search_of_failures_only_says_so_by_its_exit_code(tmp_path: Path) -> None:
    assert main([*TINY, "--try", "batch_size=5000", "--train-rows", "0", "--out", str(tmp_path)]) == 1
    assert "--batch-size: expected at most 4356" in rows(tmp_path)[0]["checkpoint or failure"]


def test_another_search_does_not_take_a_folder_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--width", "0.1", "--out", str(tmp_path)]
    assert main([*TINY, "--try", "shift=0", *flags]) == 0
    assert main([*TINY, "--try", "shift=1", *flags]) == 1
    assert f"{tmp_path / '01'}: has a trial of another search" in capsys.readouterr().err
    assert load_info(tmp_path / "01").recipe["shift"] == 0


def test_ctrl_c_prints_the_table_so_far_and_the_search_goes_on_later(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train", *TINY, "--try", "width=0.1,0.2", "--out", str(tmp_path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("2/2"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert "rank  width" in printed
    first = json.loads((tmp_path / "01" / INFO).read_text())
    assert main(command[3:]) == 0
    assert json.loads((tmp_path / "01" / INFO).read_text()) == first
    assert len(rows(tmp_path)) == 2
