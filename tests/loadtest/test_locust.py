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
    """Half a second of two without answers: more than a tenth of the requests wait for 0.1 s."""
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
    """In turn, until both had a quiet moment: what else this machine does only adds to a p50."""
    seconds = 2
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
            "--warmup=0.2", "--metrics-url=", f"--url={target.url}", f"--json={tmp_path / 'run.json'}",
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
            return
    raise AssertionError(f"requests/s {rates}, p50 {p50s}")


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
        done = locust("--host", url, *models, load, value, "-r", "2", "-t", "2s", "--csv", tmp_path / load)
        assert done.returncode == 0, done.stdout
        found = rows(tmp_path / load)
        one, three = (found[name]["Request Count"] for name in ("one", "three"))
        assert one + three == found["Aggregated"]["Request Count"] > 300
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
        assert 50 <= first["Min Response Time"]
        assert first["50%"] + 150 < whole["50%"]
        assert whole["Min Response Time"] >= 250
    assert sent_late(done.stdout) == [whole["Request Count"]]


def test_what_is_under_way_at_the_end_is_given_up_and_said(start_stub: Callable[..., str]) -> None:
    done = locust("--host", start_stub("--service-ms=5000"), "--model", "stub", "--rate", "20", "-t", "1s")
    assert done.returncode == 0, done.stdout
    (sent,) = sent_late(done.stdout)
    assert f"{sent} requests were under way at the end and are not counted" in done.stdout


def test_tls_and_tokens_are_used_and_their_refusal_ends_the_test(
    tmp_path: Path, serve: Callable[..., RunningServer]
) -> None:
    write_model(tmp_path / "models" / "tiny", scaled(1))
    right, wrong = Authority(tmp_path / "right"), Authority(tmp_path / "wrong")
    pair, client = right.issue("server"), right.issue("client")
    tokens = tmp_path / "tokens"
    tokens.write_text("secret-0123456789abcdef\n")
    tokens.chmod(0o600)
    server = serve(
        "--model-repository", tmp_path / "models", "--grpc-use-ssl-mutual",
        f"--grpc-server-cert={pair.certificate}", f"--grpc-server-key={pair.key}",
        f"--grpc-root-cert={right.root}", f"--auth-token-file={tokens}",
    )  # fmt: skip
    base = (
        "--host",
        f"localhost:{server.grpc_port}",
        "--model",
        "tiny",
        "-t",
        "1s",
        "--csv",
        tmp_path / "run",
    )
    shown = ("--client-cert", client.certificate, "--client-key", client.key)
    token = ("--header", "authorization: Bearer secret-0123456789abcdef")
    good = locust(*base, "--root-cert", right.root, *shown, "--token-file", tokens)
    assert good.returncode == 0, good.stdout
    assert rows(tmp_path / "run")["tiny"]["Failure Count"] == 0
    for status, flags in (
        ("UNAVAILABLE", ("--root-cert", wrong.root, *shown, *token)),
        ("UNAUTHENTICATED", ("--root-cert", right.root, *shown, "--header", "authorization: Bearer wrong")),
    ):
        assert_refused(locust(*base, *flags), f"localhost:{server.grpc_port}: {status}")


def assert_refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    """One line says why."""
    assert (done.returncode, "Traceback" in done.stdout) == (1, False), done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "ERROR" in line)
    assert reason in line


@pytest.mark.parametrize(
    "load", [("--rate", str(RATE)), ("--rate", str(RATE), "--arrivals", "constant"), ("-u", "4")]
)
def test_processes_share_the_load(load: tuple[str, ...], tmp_path: Path) -> None:
    with recording() as (recorder, url):
        done = locust(
            "--host", url, "--model", "stub", *load, "-r", "4", "-t", "2s", "--processes", "2",
            "--stop-timeout", "10", "--csv", tmp_path / "run",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        seen = recorder.arrivals()
    total = rows(tmp_path / "run")["Aggregated"]
    assert (total["Request Count"], total["Failure Count"]) == (len(seen), 0)
    assert any(total[f"{percent}%"] % 1 for percent in ("50", "90", "99"))
    if load[0] == "--rate":
        shares = sent_late(done.stdout)
        assert (len(shares), sum(shares)) == (2, len(seen))
        assert shares[0] == pytest.approx(shares[1], rel=0.5)
        assert total["Requests/s"] == pytest.approx(RATE, rel=0.15)
        expected = [1.0] * 3 if "constant" in load else OF_A_POISSON_PROCESS
        assert gap_quartiles(seen, RATE) == pytest.approx(expected, rel=0.4)


def test_a_master_and_workers_of_their_own(target: RunningServer, tmp_path: Path) -> None:
    """The workers are told nothing but where the master is."""
    port = str(free_port())
    workers = ("--worker", "--master-host", "127.0.0.1", "--master-port", port)
    with started(*workers) as first, started(*workers) as second:
        done = locust(
            "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers", "2",
            "--host", target.url, "--model", "tiny", "--rate", "100", "-t", "1s", "--csv", tmp_path / "run",
        )  # fmt: skip
        outputs = [worker.communicate(timeout=30)[0] for worker in (first, second)]
    assert done.returncode == 0, done.stdout
    assert [len(sent_late(output)) for output in outputs] == [1, 1]
    total = rows(tmp_path / "run")["Aggregated"]
    assert (total["Request Count"] > 40, total["Failure Count"]) == (True, 0)


def ask(port: int, path: str, **form: object) -> Any:
    """An answer of the web page's server; a form is posted."""
    data = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=10) as answer:
        text = answer.read().decode()
    return json.loads(text) if path != "/" else text


def test_the_web_page_starts_and_stops_tests_as_its_form_says(target: RunningServer) -> None:
    port = free_port()
    form = {"user_count": 2, "spawn_rate": 2, "host": target.url, "model": "tiny"}
    with started("--web-host", "127.0.0.1", "--web-port", str(port)) as process:

        def page() -> str:
            assert process.poll() is None
            try:
                return str(ask(port, "/"))
            except OSError:
                return ""

        def counted(state: str) -> dict[str, Any]:
            report = ask(port, "/stats/requests")
            busy = state != "running" or any(row["num_requests"] for row in report["stats"])
            return dict(report) if report["state"] == state and busy else {}

        shown = until(page, "no page")
        assert all(f'"{field}"' in shown for field in ("model", "rate", "arrivals", "stages"))
        assert '"header"' not in shown  # secrets stay on the command line
        for load, users in (({}, 2), ({"rate": 100}, 1), ({"stages": "1:1s", "rate": ""}, 1)):
            assert ask(port, "/swarm", **form, **load)["success"]
            report = until(lambda: counted("running"), f"{load}: nothing was counted")
            assert report["user_count"] == users
            assert (report["stats"][0]["name"], report["stats"][0]["num_failures"]) == ("tiny", 0)
            assert report["stats"][0]["min_response_time"] % 1
            if "stages" not in load:  # which end by themselves
                assert ask(port, "/stop", stop=1)["success"]
            until(lambda: counted("stopped"), f"{load}: it didn't stop")
        wrong = ask(port, "/swarm", **{**form, "rate": "fast", "stages": ""})
        assert (wrong["success"], "--rate is 'fast'" in wrong["message"]) == (False, True)
        ask(port, "/swarm", **{**form, "model": "nope", "rate": "", "stages": ""})
        until(lambda: "NOT_FOUND" in json.dumps(ask(port, "/exceptions")), "no reason was given")
        until(lambda: counted("stopped"), "it didn't stop")
        process.terminate()
        output = process.communicate(timeout=30)[0]
    assert (process.returncode, "Traceback" in output) == (1, False), output  # the last test failed


def test_a_shape_has_as_many_users_as_its_stages_say(target: RunningServer) -> None:
    done = locust("--host", target.url, "--model", "tiny", "--stages", "1:1s,3:1s", "-r", "10")
    assert done.returncode == 0, done.stdout
    spawned = re.findall(r"All users spawned: .* \((\d) total users\)", done.stdout)
    assert spawned == ["1", "3"]


def test_an_open_loop_in_stages_ends_with_them() -> None:
    with recording() as (recorder, url):
        done = locust(
            "--host", url, "--model", "stub", "--rate-stages", "50:1s,250:1s", "--stop-timeout", "10"
        )
        assert done.returncode == 0, done.stdout
        seen = recorder.arrivals()
    slow, fast = np.histogram(seen, [0, 1, 10])[0]
    assert 20 < slow < 100 < 180 < fast < 330


def test_errors_are_one_row_for_each_reason(start_stub: Callable[..., str], tmp_path: Path) -> None:
    url = start_stub("--status=INTERNAL", "--fail-every=2")
    done = locust("--host", url, "--model", "stub", "--rate", "50", "-t", "1s", "--csv", tmp_path / "run")
    assert done.returncode == 1
    with (tmp_path / "run_failures.csv").open() as file:
        (failure,) = csv.DictReader(file)
    assert "INTERNAL: the stub was told to" in failure["Error"]
    row = rows(tmp_path / "run")["stub"]
    assert int(failure["Occurrences"]) == row["Failure Count"] == row["Request Count"] // 2


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--host", "127.0.0.1:1"), "127.0.0.1:1: UNAVAILABLE"),
        (("--host", "127.0.0.1:1", "--wait", "0.2"), "nothing answers within 0.2 s"),
        (("--model", "nope"), "NOT_FOUND: Request for unknown model: 'nope'"),
        (
            ("--model", "nope", "--rate", "10", "--processes", "2"),
            "NOT_FOUND: Request for unknown model: 'nope'",
        ),
        (("--ssl",), "UNAVAILABLE"),
        (("--token-file", "nothing"), "nothing"),
        (("--header", "x"), "expected 'NAME: VALUE'"),
        (("--model", "tiny=0"), "--model is 'tiny=0'"),
        (("--rate", "1", "--stages", "1:1s"), "use --rate-stages"),
        (("--timeout", "0"), "--timeout is 0"),
        (("OpenLoopUser",), "OpenLoopUser needs --rate"),
    ],
)
def test_a_test_that_can_not_begin_is_one_line(
    target: RunningServer, flags: tuple[str, ...], reason: str
) -> None:
    host = () if "--host" in flags else ("--host", target.url)
    assert_refused(locust("--model", "tiny", "-t", "60s", *host, *flags), reason)


@pytest.mark.parametrize(
    "flags", [("--rate", "fast"), ("--rate", "0"), ("--stages", "5"), ("--rate-stages", "1:x")]
)
def test_a_flag_that_can_not_be_read_is_one_line(flags: tuple[str, ...]) -> None:
    done = locust(*flags, "--processes", "2")
    assert (done.returncode, len(done.stdout.splitlines())) == (2, 1), done.stdout
    assert flags[0] in done.stdout
