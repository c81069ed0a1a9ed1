"""The ways to start the locustfile under the real locust: processes, web page, TLS, and what can't begin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.graphs import scaled, write_model
from tests.loadtest.conftest import ROOT
from tests.loadtest.locust_runs import (
    LIKE_A_POISSON_PROCESS,
    free_port,
    gap_quartiles,
    hold_to,
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
PERCENTILES = tuple(f"response_time_percentile_{percent}" for percent in (0.95, 0.99, 0.999))


def test_processes_share_an_open_loop(tmp_path: Path) -> None:
    flags = ("--rate", str(RATE), "--processes", "2", "--stop-timeout", "10", "--csv", tmp_path / "run")

    def attempt() -> object:
        with (
            recording() as (recorder, url),
            started("--headless", "--only-summary", "--host", url, "--model", "stub", *flags) as process,
        ):
            until(lambda: len(recorder.times) > 2 * RATE, "no requests")
            process.terminate()
            output = process.communicate(timeout=60)[0]
            seen = recorder.arrivals()
        assert (process.returncode, "Traceback" in output) == (0, False), output
        shares, counted = sent_late(output), rows(tmp_path / "run")["Aggregated"]
        assert (len(shares), sum(shares), counted["Failure Count"]) == (2, len(seen), 0)
        good = (
            # The master waits half a second for what its workers counted last.
            counted["Request Count"] == len(seen)
            and counted["Requests/s"] == pytest.approx(RATE, rel=0.2)
            and shares[0] == pytest.approx(shares[1], rel=0.4)
            and gap_quartiles(seen, RATE) == LIKE_A_POISSON_PROCESS
        )
        return not good and (counted, shares, gap_quartiles(seen, RATE))

    hold_to(attempt)


def test_each_process_has_one_user_of_an_open_loop_also_when_others_join_and_leave() -> None:
    script = """
from argparse import Namespace
from locust import User
from locust.runners import WorkerNode
from loadtest.locust_open_loop import OneUserPerProcess
class Closed(User): pass
class Open(User): fixed_count = 1
OneUserPerProcess.options = options = Namespace()
nodes = [WorkerNode(name) for name in "abc"]
def dispatch(dispatcher, users):
    dispatcher.new_dispatch(users, 100)
    for found in dispatcher: pass
    print([[found[node].get(kind, 0) for kind in ("Open", "Closed")] for node in sorted(found)],
          options.open_loop_processes)
dispatcher = OneUserPerProcess(nodes[:1], [Open])
dispatch(dispatcher, 5)
dispatcher.add_worker(nodes[1])
dispatch(dispatcher, 5)
dispatcher.add_worker(nodes[2])
dispatch(dispatcher, 1)
dispatcher.remove_worker(nodes[0])
dispatch(dispatcher, 1)
dispatch(OneUserPerProcess(nodes[:2], [Open, Closed]), 6)
dispatch(OneUserPerProcess(nodes[:2], [Closed]), 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "[[1, 0]] 1", "[[1, 0], [1, 0]] 2", "[[1, 0], [1, 0], [1, 0]] 3", "[[1, 0], [1, 0]] 2",
        "[[1, 2], [1, 2]] 2", "[[0, 2], [0, 1]] 2",
    ]  # fmt: skip


def ask(port: int, path: str, **form: object) -> Any:
    """An answer of the web page's server; a form is posted."""
    data = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=10) as answer:
        text = answer.read().decode()
    return json.loads(text) if path != "/" else text


def page_of(port: int, process: subprocess.Popen[str]) -> str:
    """The web page, when it is there."""

    def page() -> str:
        assert process.poll() is None
        try:
            return str(ask(port, "/"))
        except OSError:
            return ""

    return str(until(page, "no page"))


def has_fractions(row: dict[str, Any]) -> bool:
    """Whether times are not of whole milliseconds; a single one may be by chance."""
    return any(row[time] % 1 for time in ("min_response_time", "median_response_time", *PERCENTILES))


def has_users(port: int, users: int) -> bool:
    return bool(ask(port, "/stats/requests")["user_count"] == users)


def report_of(port: int, state: str, workers: int = 0) -> dict[str, Any]:
    """The statistics that the web page shows, when a test is in this state, and has counted if it runs."""

    def report() -> dict[str, Any]:
        found: dict[str, Any] = ask(port, "/stats/requests")
        counted = state != "running" or any(row["num_requests"] for row in found["stats"])
        there = found.get("worker_count", 0) == workers
        return found if found["state"] == state and counted and there else {}

    return dict(until(report, f"the test is not {state}, or nothing was counted"))


def test_the_web_page_starts_and_stops_tests_as_its_form_says(target: RunningServer) -> None:
    port = free_port()
    form = {"user_count": 2, "spawn_rate": 2, "host": target.url, "model": "tiny"}
    with started("--web-host", "127.0.0.1", "--web-port", str(port)) as process:
        shown = page_of(port, process)
        assert all(f'"{field}"' in shown for field in ("model", "rate", "arrivals", "stages"))
        assert '"header"' not in shown  # secrets stay on the command line
        for load, users in (({"rate": 100}, 1), ({"stages": "2:60s", "rate": ""}, 2)):
            assert ask(port, "/swarm", **form, **load)["success"]
            report = report_of(port, "running")
            assert (report["stats"][0]["name"], report["stats"][0]["num_failures"]) == ("tiny", 0)
            assert has_fractions(report["stats"][0])
            until(partial(has_users, port, users), f"not {users} users")
            assert ask(port, "/stop", stop=1)["success"]
            report_of(port, "stopped")
        wrong = ask(port, "/swarm", **{**form, "rate": "fast", "stages": ""})
        assert (wrong["success"], "--rate is 'fast'" in wrong["message"]) == (False, True)
        ask(port, "/swarm", **{**form, "model": "nope", "rate": "", "stages": ""})
        until(lambda: "NOT_FOUND" in json.dumps(ask(port, "/exceptions")), "no reason was given")
        report_of(port, "stopped")
        process.terminate()
        output = process.communicate(timeout=30)[0]
    assert (process.returncode, "Traceback" in output) == (1, False), output  # the last test failed


def test_workers_of_their_own_are_told_nothing_but_where_the_master_is(target: RunningServer) -> None:
    port, web = free_port(), free_port()
    addresses = ("--master-bind-host", "127.0.0.1", "--master-bind-port", str(port))
    page = ("--web-host", "127.0.0.1", "--web-port", str(web))
    workers = ("--worker", "--master-host", "127.0.0.1", "--master-port", str(port))
    form = {"user_count": 4, "spawn_rate": 4, "host": target.url, "model": "tiny", "rate": ""}
    with (
        started("--master", *addresses, *page) as master,
        started(*workers) as first, started(*workers) as second,
    ):  # fmt: skip
        page_of(web, master)
        until(lambda: ask(web, "/worker-count")["worker_count"] == 2, "not two workers")
        # A model that isn't there ends the test, but no worker.
        assert ask(web, "/swarm", **{**form, "model": "nope"})["success"]
        until(lambda: "NOT_FOUND" in json.dumps(ask(web, "/exceptions")), "no reason was given")
        report_of(web, "stopped", workers=2)
        assert ask(web, "/swarm", **form)["success"]
        row = report_of(web, "running", workers=2)["stats"][0]
        assert (row["name"], row["num_failures"]) == ("tiny", 0)
        assert has_fractions(row)
        master.terminate()
        outputs = [process.communicate(timeout=60)[0] for process in (master, first, second)]
    assert [process.returncode for process in (master, first, second)] == [0, 0, 0], outputs
    assert "Traceback" not in "".join(outputs)


def test_a_shape_has_as_many_users_as_its_stages_say(target: RunningServer) -> None:
    done = locust("--host", target.url, "--model", "tiny", "--stages", "1:1s,3:1s", "-r", "10")
    assert done.returncode == 0, done.stdout
    spawned = re.findall(r"All users spawned: .* \((\d) total users\)", done.stdout)
    assert spawned == ["1", "3"]


def assert_refused(done: subprocess.CompletedProcess[str], reason: str) -> None:
    """One line says why."""
    assert (done.returncode, "Traceback" in done.stdout) == (1, False), done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "ERROR" in line)
    assert reason in line


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
