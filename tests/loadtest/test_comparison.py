"""Two runs side by side: what is a change, and what is chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadtest.comparison import compare
from loadtest.result import write_result
from tests.loadtest.conftest import loadtest
from tests.loadtest.recordings import result_of, samples_of

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.result import RunResult

SECONDS, COUNT = 20.0, 4000


def run_of(seed: int, factor: float = 1.0, slow_seconds: float = 0.0) -> RunResult:
    """Latencies around 5 ms; in a part of each run's seconds, drawn anew, all take three times as long."""
    random = np.random.default_rng(seed)
    scheduled = np.sort(random.uniform(0, SECONDS * 1e9, COUNT)).astype(np.int64)
    took = random.gamma(4, 1.25e6 * factor, COUNT)
    slow = random.random(20) < slow_seconds
    took *= np.where(slow[(scheduled / 1e9).astype(int)], 3.0, 1.0)
    return result_of(samples_of(scheduled, took.astype(np.int64)), SECONDS)


def test_a_change_is_found_with_its_size() -> None:
    changes = {change.metric: change for change in compare(run_of(1), run_of(2, factor=1.1))}
    for metric in ("p50", "p90", "mean"):
        assert changes[metric].verdict == "worse"
        assert changes[metric].low - 0.02 < 0.1 < changes[metric].high + 0.02
        assert changes[metric].high - changes[metric].low < 0.12
    assert changes["throughput"].verdict == "no difference"
    back = {change.metric: change for change in compare(run_of(2, factor=1.1), run_of(1))}
    assert back["p50"].verdict == "better"


@pytest.mark.parametrize("slow_seconds", [0.0, 0.3])
def test_runs_of_one_kind_rarely_differ(slow_seconds: float) -> None:
    """Also where latencies come in slow seconds, in which single requests would seem to differ."""
    pairs = [
        (run_of(2 * n, slow_seconds=slow_seconds), run_of(2 * n + 1, slow_seconds=slow_seconds))
        for n in range(20)
    ]
    verdicts = [
        change.verdict for a, b in pairs for change in compare(a, b, draws=500) if change.metric == "p50"
    ]
    assert verdicts.count("no difference") >= 15


def test_the_command_says_it_and_fails_on_it(tmp_path: Path) -> None:
    write_result(run_of(1), tmp_path / "a.json")
    write_result(run_of(2, factor=1.3), tmp_path / "b.json")
    worse = loadtest("compare", tmp_path / "a.json", tmp_path / "b.json", "--fail-on=p50>+10%")
    assert worse.returncode == 1
    assert "worse" in worse.stdout
    assert "FAILED p50 > +10.0%" in worse.stdout
    same = loadtest(
        "compare", tmp_path / "a.json", tmp_path / "a.json", "--fail-on=p50>+10%", "--fail-on=throughput<-5%"
    )
    assert same.returncode == 0
    assert "worse" not in same.stdout


@pytest.mark.parametrize("limit", ["p50", "p50>10", "p51>1%"])
def test_a_limit_that_makes_no_sense_is_refused(tmp_path: Path, limit: str) -> None:
    write_result(run_of(1), tmp_path / "a.json")
    done = loadtest("compare", tmp_path / "a.json", tmp_path / "a.json", f"--fail-on={limit}")
    assert (done.returncode, "--fail-on" in done.stderr) == (2, True), done.stderr


def test_a_file_that_is_no_result_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    done = loadtest("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert (done.returncode, len(done.stderr.splitlines()), "a.json" in done.stderr) == (2, 1, True)
