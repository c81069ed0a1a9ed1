"""Arrival times: as many as asked for, where they are asked for, the same from the same seed."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadtest.schedule import (
    RateProfile,
    ScheduleError,
    arrivals,
    bursts,
    ramp,
    read_trace,
    steady,
    steps,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def counts(offsets: NDArray[np.int64], edges: list[float]) -> list[int]:
    return [int(((offsets >= a * 1e9) & (offsets < b * 1e9)).sum()) for a, b in pairwise(edges)]


@pytest.mark.parametrize("seed", range(5))
def test_poisson_arrivals_vary_as_they_should(seed: int) -> None:
    offsets = arrivals(steady(2000, 10), "poisson", seed)
    gaps = np.diff(offsets)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)
    # So do the numbers of arrivals in pieces of time: as many as clients that know nothing of each other
    # send.
    in_pieces = np.histogram(offsets, 1000, (0, 10e9))[0]
    assert in_pieces.var() / in_pieces.mean() == pytest.approx(1, abs=0.2)
    assert len(offsets) == pytest.approx(20_000, abs=4 * 20_000**0.5)
    assert (gaps >= 0).all()
    assert offsets[-1] <= 10e9


def test_the_same_seed_draws_the_same_schedule() -> None:
    first, again, other = (arrivals(steady(100, 5), "poisson", seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_constant_arrivals_are_evenly_spaced() -> None:
    offsets = arrivals(steady(250, 2), "constant", 0)
    assert len(offsets) == 500
    assert set(np.diff(offsets)) <= {3_999_999, 4_000_000, 4_000_001}


def test_a_ramp_goes_evenly_from_one_rate_to_the_other() -> None:
    offsets = arrivals(ramp(100, 300, 10), "constant", 0)
    assert len(offsets) == 2000
    assert counts(offsets, [0, 2.5, 5, 7.5, 10]) == pytest.approx([312.5, 437.5, 562.5, 687.5], abs=1)


def test_steps_have_each_rate_for_its_share_of_the_time() -> None:
    assert counts(arrivals(steps([100, 400, 200], 6), "constant", 0), [0, 2, 4, 6]) == [200, 800, 400]


def test_bursts_have_all_requests_while_they_are_on() -> None:
    offsets = arrivals(bursts(100, 8, on=1, off=3), "poisson", 1)
    on, off = counts(offsets, [0, 1]), counts(offsets, [1, 4])
    assert (counts(offsets, [4, 5])[0] > 300, on[0] > 300, off, counts(offsets, [5, 8])) == (
        True,
        True,
        [0],
        [0],
    )
    assert len(offsets) == pytest.approx(800, abs=120)


@pytest.mark.parametrize(
    "profile",
    [
        lambda: steady(0, 1),
        lambda: steady(-1, 1),
        lambda: steady(10, 0),
        lambda: steady(float("nan"), 1),
        lambda: RateProfile(((0.0, 1.0), (2.0, 1.0), (1.0, 1.0))),
        lambda: RateProfile(((1.0, 1.0), (2.0, 1.0))),
        lambda: bursts(10, 5, on=0, off=1),
        lambda: steady(1e9, 1e3),
    ],
)
def test_what_makes_no_schedule_is_refused(profile: Any) -> None:
    with pytest.raises(ScheduleError):
        profile()


def test_a_trace_is_read_with_its_models(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("# of a day\ntimestamp,model\n100.5,b\n100.0,a\n102,a\n")
    offsets, models = read_trace(path)
    assert offsets.tolist() == [0, 500_000_000, 2_000_000_000]
    assert models == ["a", "b", "a"]


def test_a_trace_may_be_times_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("0\n0.25\n0.5\n")
    offsets, models = read_trace(path)
    assert (offsets.tolist(), models) == ([0, 250_000_000, 500_000_000], [])


@pytest.mark.parametrize("text", ["", "timestamp\n", "soon\n", "1\nnan\n", "timestamp,model\n1\n"])
def test_a_trace_without_times_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ScheduleError, match="trace"):
        read_trace(path)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"nothing\.csv"):
        read_trace(tmp_path / "nothing.csv")
