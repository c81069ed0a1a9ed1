"""The ways to start the locustfile under the real locust: processes, web page, TLS, and what can't begin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests.graphs import scaled, write_model
from tests.loadtest.conftest import ROOT
from tests.loadtest.locust_runs import (
    LIKE_A_POISSON_PROCESS,
    TRIES,
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


def test_processes_share_an_open_loop(tmp_path: Path) -> None:
    tried = []
    for _ in range(TRIES):
        with recording() as (recorder, url):
            done = locust(
                "--host", url, "--model", "stub", "--rate", str(RATE), "-t", "2s", "--processes", "2",
                "--stop-timeout", "10", "--csv", tmp_path / "run",
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            seen = recorder.arrivals()
        total, shares = rows(tmp_path / "run")["Aggregated"], sent_late(done.stdout)
        assert (total["Request Count"], total["Failure Count"]) == (len(seen), 0)
        assert (len(shares), sum(shares)) == (2, len(seen))
        assert total["Requests/s"] == pytest.approx(RATE, rel=0.25)
        tried.append((shares, gap_quartiles(seen, RATE)))
        if shares[0] == pytest.approx(shares[1], rel=0.4) and tried[-1][1] == LIKE_A_POISSON_PROCESS:
            return
    raise AssertionError(tried)


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


def test_workers_of_their_own_are_told_nothing_but_where_the_master_is(
    target: RunningServer, tmp_path: Path
) -> None:
    port = str(free_port())
    workers = ("--worker", "--master-host", "127.0.0.1", "--master-port", port)
    with started(*workers) as first, started(*workers) as second:
        done = locust(
            "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port,
            "--expect-workers", "2", "--host", target.url, "--model", "tiny", "-u", "4", "-r", "4",
            "-t", "1s", "--csv", tmp_path / "run",
        )  # fmt: skip
        outputs = [worker.communicate(timeout=30)[0] for worker in (first, second)]
    assert (done.returncode, first.returncode, second.returncode) == (0, 0, 0), (done.stdout, *outputs)
    assert '"InferUser": 4' in done.stdout
    row = rows(tmp_path / "run")["tiny"]
    assert (row["Request Count"] > 100, row["Failure Count"]) == (True, 0)
    assert any(row[f"{percent}%"] % 1 for percent in ("50", "90", "99", "99.9"))


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
        for load, users in (({"rate": 100}, 1), ({"stages": "2:60s", "rate": ""}, 2)):
            assert ask(port, "/swarm", **form, **load)["success"]
            report = until(lambda: counted("running"), f"{load}: nothing was counted")
            assert report["user_count"] == users
            assert (report["stats"][0]["name"], report["stats"][0]["num_failures"]) == ("tiny", 0)
            assert report["stats"][0]["min_response_time"] % 1
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
