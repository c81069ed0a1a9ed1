"""The locustfile under the real locust: both loops, what they send, and what it says of them."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadtest.locust_schedule import Share, Stage, schedule
from loadtest.schedule import arrivals, steady
from tests.graphs import scaled, write_model
from tests.loadtest.conftest import ROOT, loadtest
from tests.loadtest.locust_runs import (
    hold_to,
    locust,
    recording,
    rows,
    sent_late,
    started,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer

RATE = 200
THROUGHPUT, P50, P50_MS = 0.02, 0.3, 0.5
"""How far locust's figures may be from the engine's: relative, or in milliseconds."""


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
    """Of another schedule of this rate, 7 of 10 would be 20 ms off."""
    wanted = np.array(scheduled(7, 3))

    def attempt() -> object:
        with recording() as (recorder, url):
            done = locust(
                "--host", url, "--model", "stub", "--rate", str(RATE), "--seed", "7", "-t", "2s",
                "--csv", tmp_path / "run", "--stop-timeout", "10",
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            seen = recorder.arrivals()
        assert rows(tmp_path / "run")["stub"]["Request Count"] == sum(sent_late(done.stdout)) == len(seen)
        late = seen - (wanted[: len(seen)] - wanted[0])
        off = float(np.quantile(np.abs(late - np.median(late)), 0.7))
        return off > 7e-3 and off

    hold_to(attempt)


def test_a_freeze_counts_for_all_who_would_have_come_in_an_open_loop_alone(
    start_stub: Callable[..., str], tmp_path: Path
) -> None:
    """Half a second of one and a half without answers: more than a tenth of the requests wait for 0.1 s."""
    url = start_stub("--freeze=0.5", "--every=1.5")
    for load in (("--rate", str(RATE), "--stop-timeout", "10"), ("-u", "1")):
        done = locust("--host", url, "--model", "stub", *load, "-t", "2s", "--csv", tmp_path / load[0])
        assert done.returncode == 0, done.stdout
    assert rows(tmp_path / "--rate")["stub"]["90%"] > 100
    assert rows(tmp_path / "-u")["stub"]["90%"] < 50


def test_a_client_that_was_held_up_counts_from_the_schedule(tmp_path: Path) -> None:
    """Half a second of two in which locust itself stands still, which is said."""
    flags = ("--rate", str(RATE), "-t", "2s", "--stop-timeout", "10", "--csv", tmp_path / "run")
    with recording() as (recorder, url):
        command = ("--headless", "--only-summary", "--host", url, "--model", "stub", *flags)
        with started(*command) as process:
            until(lambda: len(recorder.times) > 50, "no requests")
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            process.send_signal(signal.SIGCONT)
            output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    row = rows(tmp_path / "run")["stub"]
    assert row["Request Count"] == sum(sent_late(output)) == len(recorder.times)
    assert 100 < row["90%"] <= row["Max Response Time"]
    assert row["Max Response Time"] > 450
    assert "more than a server should be judged by" in output


def seed_of_the_rate(times: Callable[[int], Any], seconds: float) -> int:
    """A seed whose arrivals come to the rate: of 800 they are 4 % off on average."""
    wanted = round(RATE * seconds)
    return next(seed for seed in count() if abs(len(times(seed)) - wanted) <= wanted / 500)


def test_the_open_loop_agrees_with_the_engine(target: RunningServer, tmp_path: Path) -> None:
    """In turn, until both had a quiet moment: what else this machine does only adds to a p50."""
    seconds = 2
    seed = seed_of_the_rate(lambda seed: scheduled(seed, seconds), seconds)
    engine_seed = seed_of_the_rate(lambda seed: arrivals(steady(RATE, seconds), "poisson", seed), seconds)
    rates: list[tuple[float, float]] = []
    p50s: list[tuple[float, float]] = []

    def attempt() -> object:
        done = locust(
            "--host", target.url, "--model", "tiny", "--rate", str(RATE), "--seed", str(seed),
            "-t", f"{seconds}s", "--csv", tmp_path / "run", "--stop-timeout", "10",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        theirs = loadtest(
            "--model=tiny", f"--rate={RATE}", f"--duration={seconds}", f"--seed={engine_seed}", "--quiet",
            "--warmup=0.2", "--metrics-url=", f"--url={target.url}", f"--json={tmp_path / 'run.json'}",
        )  # fmt: skip
        assert theirs.returncode == 0, theirs.stderr
        row = rows(tmp_path / "run")["Aggregated"]
        total = json.loads((tmp_path / "run.json").read_text())["total"]
        rates.append((row["Requests/s"], total["throughput"]))
        p50s.append((row["50%"], total["latency"]["percentiles"]["50"]))
        ours, engines = (min(column) for column in zip(*p50s, strict=True))
        rates_agree = any(abs(a / b - 1) <= THROUGHPUT for a, b in rates)
        p50s_agree = abs(ours - engines) <= max(P50_MS, P50 * engines)
        return not (rates_agree and p50s_agree) and (rates[-1], p50s[-1])

    hold_to(attempt)


def test_a_mix_is_called_by_weight_each_model_in_a_row_of_its_own(
    tmp_path: Path, serve: Callable[..., RunningServer]
) -> None:
    for name in ("one", "three"):
        write_model(tmp_path / "models" / name, scaled(1))
    url = serve("--model-repository", tmp_path / "models").url
    for load, models in (
        ("-u", ("--model", "one,three=3")),
        ("--rate", ("--model", "one", "--model", "three=3")),
    ):
        value = "2" if load == "-u" else "400"
        done = locust("--host", url, *models, load, value, "-r", "2", "-t", "1s", "--csv", tmp_path / load)
        assert done.returncode == 0, done.stdout
        found = rows(tmp_path / load)
        one, three = (found[name]["Request Count"] for name in ("one", "three"))
        assert one + three == found["Aggregated"]["Request Count"] > 200
        assert three / (one + three) == pytest.approx(0.75, abs=0.1)


def test_a_stream_has_a_row_for_its_first_token_which_is_no_request_more(
    start_stub: Callable[..., str], tmp_path: Path
) -> None:
    """Five tokens, 50 ms from one to the next; what is under way at the end is waited for."""
    url = start_stub("--tokens=5", "--token-ms=50")
    for load in ("-u", "--rate"):
        done = locust(
            "--host", url, "--model", "stub", load, "20", "-r", "20", "-t", "1s", "--stop-timeout", "10",
            "--csv", tmp_path / load,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        found = rows(tmp_path / load)
        whole, first = found["stub"], found["stub first token"]
        assert whole["Request Count"] == first["Request Count"] == found["Aggregated"]["Request Count"] > 5
        assert first["Min Response Time"] >= 50
        assert first["50%"] + 150 < whole["50%"]
        assert whole["Min Response Time"] >= 250
    assert sent_late(done.stdout) == [whole["Request Count"]]


def test_what_is_under_way_at_the_end_is_given_up_and_said(
    start_stub: Callable[..., str], tmp_path: Path
) -> None:
    url = start_stub("--service-ms=300")
    done = locust(
        "--host", url, "--model", "stub", "--rate", "10", "-t", "1s", "--csv", tmp_path / "run"
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stdout) == (0, False), done.stdout
    left = re.search(r"(\d+) requests were under way at the end and are not counted", done.stdout)
    assert left
    assert sent_late(done.stdout) == [int(left[1]) + rows(tmp_path / "run")["Aggregated"]["Request Count"]]


def test_an_open_loop_in_stages_ends_with_them() -> None:
    stages = ("--rate-stages", "50:1s,250:1s", "--stop-timeout", "10")

    def attempt() -> object:
        with recording() as (recorder, url):
            done = locust("--host", url, "--model", "stub", *stages)
            assert done.returncode == 0, done.stdout
            seen = recorder.arrivals()
        assert sum(sent_late(done.stdout)) == len(seen)
        slow, fast = np.histogram(seen, [0, 1, 10])[0]
        return (slow != pytest.approx(50, abs=25) or fast != pytest.approx(250, abs=60)) and (slow, fast)

    hold_to(attempt)


def test_errors_are_one_row_for_each_reason(start_stub: Callable[..., str], tmp_path: Path) -> None:
    url = start_stub("--status=INTERNAL", "--fail-every=2")
    done = locust("--host", url, "--model", "stub", "--rate", "50", "-t", "1s", "--csv", tmp_path / "run")
    assert done.returncode == 1
    with (tmp_path / "run_failures.csv").open() as file:
        (failure,) = csv.DictReader(file)
    assert "INTERNAL: the stub was told to" in failure["Error"]
    row = rows(tmp_path / "run")["stub"]
    assert int(failure["Occurrences"]) == row["Failure Count"] == row["Request Count"] // 2
