"""The locustfile under the real locust: both loops, all ways to start it, what it writes, how it fails."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadtest.locust_schedule import Share, Stage, schedule
from loadtest.schedule import arrivals, steady
from tests.graphs import scaled, write_model
from tests.loadtest.conftest import ROOT, loadtest
from tests.loadtest.locust_runs import (
    OF_A_POISSON_PROCESS,
    free_port,
    gap_quartiles,
    locust,
    recording,
    rows,
    sent_late,
    started,
    until,
)
from tests.serve.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer

RATE = 200
THROUGHPUT, P50, P50_MS, ROUNDS = 0.02, 0.3, 0.5, 6
"""How far locust's figures may be from the engine's, and in how many tries."""


def scheduled(seed: int, seconds: float) -> list[float]:
    """When one process sends the requests of an open loop, in seconds."""
    draws = schedule((Stage(RATE, float("inf")),), Share, [1.0], "poisson", seed)
    return [arrival.due / 1e9 for arrival in takewhile(lambda a: a.due < seconds * 1e9, draws)]


def test_the_closed_loop_counts_what_the_server_counted_and_keeps_fractions(
    target: RunningServer, tmp_path: Path
) -> None:
    metric = r'nv_inference_request_success\{model="tiny".*\} (\d+)'
    before = re.search(metric, target.metrics())
    done = locust(
        "--host", target.url, "--model", "tiny", "-u", "2", "-r", "2", "-t", "1s", "--csv", tmp_path / "run"
    )
    assert done.returncode == 0, done.stdout
    after = re.search(metric, target.metrics())
    assert after
    row, total = rows(tmp_path / "run")["tiny"], rows(tmp_path / "run")["Aggregated"]
    answered = int(after[1]) - (int(before[1]) if before else 0)
    assert answered - 2 <= row["Request Count"] <= answered  # the two of the end are not counted
    assert (total["Request Count"], row["Failure Count"]) == (row["Request Count"], 0)
    assert row["Average Content Size"] > 10
    times = [row[f"{percent}%"] for percent in ("50", "90", "99", "99.9")]
    assert 0 < row["Min Response Time"] <= times[0] <= times[1] <= times[2] <= times[3]
    assert row["50%"] == row["Median Response Time"]
    assert any(time % 1 for time in times)
    # The same in the table that is printed.
    printed = re.search(r"percentiles.*?gRPC +tiny +([\d.]+)", done.stdout, re.DOTALL)
    assert printed
    assert float(printed[1]) == pytest.approx(times[0], abs=0.01)


def test_times_are_kept_to_three_digits() -> None:
    script = """
from loadtest.locust_statistics import bucket, text
print(*(f"{bucket(t):g}" for t in (0.0004, 0.33333, 1.0, 9.999, 33.333, 333.33, 3333.3, 33333.0)))
print(*(text(t) for t in (0, 0.33333, 3.3333, 33.333, 333.33, 333333.0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "0 0.333 1 10 33.3 333 3330 33300",
        "0.000 0.333 3.33 33.3 333 333333",
    ]


def test_the_open_loop_keeps_to_its_schedule(tmp_path: Path) -> None:
    with recording() as (recorder, url):
        done = locust(
            "--host", url, "--model", "stub", "--rate", str(RATE), "--seed", "7", "-t", "3s",
            "--csv", tmp_path / "run", "--stop-timeout", "10",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        seen = recorder.arrivals()
    wanted = np.array(scheduled(7, 4))[: len(seen)]
    late = seen - (wanted - wanted[0])
    # Most, because this machine does other things, too.
    assert np.quantile(np.abs(late - np.median(late)), 0.8) < 5e-3
    assert len(seen) == pytest.approx(3 * RATE, rel=0.15)
    assert gap_quartiles(seen, RATE) == pytest.approx(OF_A_POISSON_PROCESS, rel=0.3)
    assert rows(tmp_path / "run")["stub"]["Request Count"] == sum(sent_late(done.stdout)) == len(seen)


def test_a_freeze_counts_for_all_who_would_have_come_in_an_open_loop_alone(
    start_stub: Callable[..., str], tmp_path: Path
) -> None:
    """Half a second of two without answers: a tenth of the requests comes in the first 0.2 s of it, or more."""
    url = start_stub("--freeze=0.5", "--every=2")
    for load in (("--rate", str(RATE), "--stop-timeout", "10"), ("-u", "1")):
        done = locust("--host", url, "--model", "stub", *load, "-t", "3s", "--csv", tmp_path / load[0])
        assert done.returncode == 0, done.stdout
    assert rows(tmp_path / "--rate")["stub"]["90%"] > 100
    assert rows(tmp_path / "-u")["stub"]["90%"] < 50


def seed_of_the_rate(times: Callable[[int], Any], seconds: float) -> int:
    """A seed whose arrivals come to the rate: of 800 they are 4 % off on average."""
    wanted = round(RATE * seconds)
    return next(seed for seed in count() if abs(len(times(seed)) - wanted) <= wanted / 500)


def test_the_open_loop_agrees_with_the_engine(target: RunningServer, tmp_path: Path) -> None:
    """In turn, until both had a quiet moment: what else this machine does adds to a p50, it takes nothing off."""
    seconds = 3
    seed = seed_of_the_rate(lambda seed: scheduled(seed, seconds), seconds)
    engine_seed = seed_of_the_rate(lambda seed: arrivals(steady(RATE, seconds), "poisson", seed), seconds)
    rates: list[tuple[float, float]] = []
    p50s: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        done = locust(
            "--host", target.url, "--model", "tiny", "--rate", str(RATE), "--seed", str(seed),
            "-t", f"{seconds}s", "--csv", tmp_path / "run", "--stop-timeout", "10",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        theirs = loadtest(
            "--model=tiny", f"--rate={RATE}", f"--duration={seconds}", f"--seed={engine_seed}", "--quiet",
            "--metrics-url=", f"--url={target.url}", f"--json={tmp_path / 'run.json'}",
        )  # fmt: skip
        assert theirs.returncode == 0, theirs.stderr
        row, total = (
            rows(tmp_path / "run")["Aggregated"],
            json.loads((tmp_path / "run.json").read_text())["total"],
        )
        rates.append((row["Requests/s"], total["throughput"]))
        p50s.append((row["50%"], total["latency"]["percentiles"]["50"]))
        ours, engines = (min(column) for column in zip(*p50s, strict=True))
        near = [abs(a / b - 1) <= THROUGHPUT for a, b in rates]
        if any(near) and abs(ours - engines) <= max(P50_MS, P50 * engines):
            print(rates, p50s)
            return
    raise AssertionError(f"requests/s {rates}, p50 {p50s}")
