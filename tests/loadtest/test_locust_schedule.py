"""The share of an open loop that each process of locust sends."""

from __future__ import annotations

from itertools import islice, takewhile

import numpy as np
import pytest

from loadtest.locust_schedule import Share, Stage, common_start, parse_stages, schedule
from loadtest.settings import SettingsError
from tests.loadtest.locust_runs import variation

ENDLESS = float("inf")


def drawn(
    rate: float, share: Share, process: str = "poisson", seconds: float = 60.0, seed: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    arrivals = schedule((Stage(rate, ENDLESS),), lambda: share, [1.0], process, seed)  # type: ignore[arg-type] # a parameter of the tests
    return np.array([arrival.due / 1e9 for arrival in takewhile(lambda a: a.due < seconds * 1e9, arrivals)])


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_together_are_a_poisson_process_of_the_rate(processes: int) -> None:
    shares = [drawn(100, Share(number, processes)) for number in range(processes)]
    together = np.sort(np.concatenate(shares))
    assert len(together) == pytest.approx(6000, abs=4 * np.sqrt(6000))
    assert variation(together) == pytest.approx(1, abs=0.05)
    counts = np.histogram(together, np.arange(0, 60.1, 0.25))[0]
    # Of a Poisson process the variance of a count is its mean.
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.4)
    assert all((np.diff(share) >= 0).all() for share in shares)


def test_a_seed_and_a_number_make_a_schedule() -> None:
    first, again = drawn(50, Share(), seed=1), drawn(50, Share(), seed=1)
    assert np.array_equal(first, again)
    for other in (drawn(50, Share(), seed=2), drawn(50, Share(1, 1), seed=1)):
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("rate", [0.2, 3.0, 7.3, 1000.0])
@pytest.mark.parametrize("processes", [1, 3])
def test_constant_arrivals_are_evenly_spaced_over_all_processes(rate: float, processes: int) -> None:
    seconds = max(30 / rate, 1.0)
    shares = []
    for number in range(processes):
        share = Share(number, processes)
        start = common_start(10**18 + number * 77_777_777, rate, share)  # each is ready at another time
        shares.append((start - 10**18) / 1e9 + drawn(rate, share, "constant", seconds))
    together = np.sort(np.concatenate(shares))
    spaced = np.diff(together[(together > shares[-1][0]) & (together < seconds)])
    assert len(spaced) > 10
    assert spaced == pytest.approx(1 / rate, rel=1e-3)


def test_stages_follow_each_other() -> None:
    stages = (Stage(100, 10), Stage(300, 5))
    dues = np.array([a.due for a in schedule(stages, Share, [1.0], "constant", 0)]) / 1e9
    assert np.histogram(dues, [0, 10, 15])[0].tolist() == [1000, 1500]
    assert dues.max() < 15


def test_a_process_that_joins_takes_its_share() -> None:
    shares = iter([Share(0, 1)] * 2 + [Share(0, 2)] * 2)
    arrivals = schedule((Stage(10, ENDLESS),), lambda: next(shares), [1.0], "constant", 0)
    dues = [arrival.due / 1e9 for arrival in islice(arrivals, 30)]
    assert np.histogram(dues, [0, 1, 2, 3, 4])[0].tolist() == [10, 10, 5, 5]


def test_models_are_drawn_by_weight() -> None:
    arrivals = islice(schedule((Stage(100, ENDLESS),), Share, [3.0, 1.0], "poisson", 0), 4000)
    assert sum(arrival.model for arrival in arrivals) == pytest.approx(1000, abs=120)


def test_stages_are_read() -> None:
    assert parse_stages("10:30s, 0.5:1m,7:2h,1:4", "--stages") == (
        Stage(10, 30), Stage(0.5, 60), Stage(7, 7200), Stage(1, 4)
    )  # fmt: skip
    assert parse_stages("", "--stages") == ()
    for wrong in ("10", "10:", ":30s", "10:30x", "10:30s;", "-1:30s", "0:30s", "1:0s", "a:1s", "1:1s,"):
        with pytest.raises(SettingsError):
            parse_stages(wrong, "--stages")
