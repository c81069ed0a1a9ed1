"""`python -m loadtest` as a user runs it, against the real server: what it prints, writes and returns."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from loadtest.result import read_result
from tests.graphs import scaled, write_model
from tests.loadtest.conftest import ROOT, loadtest
from tests.serve.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import RunningServer


def reported(output: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d.]+)", output, re.MULTILINE)
    assert found, output
    return float(found[1])


def server_count(server: RunningServer) -> float:
    line = re.search(
        r'^nv_inference_request_success\{model="tiny".*\} (\d+)$', server.metrics(), re.MULTILINE
    )
    assert line
    return float(line[1])


def test_the_open_loop_reports_what_the_server_counted(target: RunningServer, tmp_path: Path) -> None:
    metrics = f"--metrics-url=http://127.0.0.1:{target.metrics_port}/metrics"
    files = [f"--{kind}={tmp_path / f'run.{kind}'}" for kind in ("json", "csv", "html")]
    done = loadtest(
        "--model=tiny", "--rate=100", "--duration=2", "--seed=5", "--fail-on=errors>0", "--fail-on=p50>1s",
        f"--url={target.url}", metrics, *files,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr  # 3: this machine was too busy to send on time, and says so
    result = read_result(tmp_path / "run.json")
    assert (done.returncode == 0) == result.validity.valid
    assert ("verdict: PASSED" in done.stdout) == result.validity.valid
    assert result.total.answered == result.total.offered == result.server.models["tiny"].requests
    assert result.total.throughput == pytest.approx(100, rel=0.3)  # Poisson: 200 ± 14
    side = result.server.models["tiny"]
    parts = side.queue + side.compute_input + side.compute_infer + side.compute_output
    assert 0 < parts <= side.total * 1.01
    assert side.total <= result.total.service.mean
    assert (
        sum(int(size) * count for size, count in side.batch_sizes.items()) == side.inferences == side.requests
    )
    counted = result.server.metrics['nv_inference_request_success{model="tiny",version="1"}']
    assert counted[1] - counted[0] == result.total.answered
    assert result.seed == 5
    with (tmp_path / "run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["(all)", "tiny"]
    assert int(rows[0]["answered"]) == result.total.answered
    assert "</html>" in (tmp_path / "run.html").read_text()


def test_a_closed_loop_obeys_littles_law(target: RunningServer) -> None:
    before = server_count(target)
    done = loadtest("--model=tiny", "--users=4", "--duration=2", f"--url={target.url}")
    assert done.returncode == 0, done.stderr
    answered, throughput = reported(done.stdout, "requests answered"), reported(done.stdout, "throughput")
    assert answered / 4 < throughput <= answered / 2 * 1.01
    assert answered <= server_count(target) - before  # the warm-up is the server's alone
    p50, p90, p99 = (reported(done.stdout, name) for name in ("p50", "p90", "p99"))
    assert 0 < p50 <= p90 <= p99 <= reported(done.stdout, "max")
    assert reported(done.stdout, "failed") == 0
    # Of four users at most four are waiting, and most of them most of the time.
    assert 2 < throughput * reported(done.stdout, "mean") / 1000 <= 4.2
    assert "no figure for a release" in done.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "closed loop, 1 user, for 1 s"),
        (("--scenario=multi-stream",), "1 user, 8 requests together"),
        (("--scenario=offline", "--queries=300", "--batch-size=4"), "32 users, for 1 s or 300 queries"),
        (("--rate=50:150",), "Poisson arrivals at 50 to 150 requests/s"),
        (("--rate=50,100,150", "--arrivals=constant"), "constant arrivals at 50, 100, 150 requests/s"),
        (("--rate=100", "--arrivals=burst", "--burst-on=0.2", "--burst-off=0.3"), "burst arrivals at 100"),
        (("--rate=100", "--processes=2", "--connections=2"), "Poisson arrivals at 100"),
    ],
)
def test_every_kind_of_load_is_sent(target: RunningServer, flags: tuple[str, ...], expected: str) -> None:
    done = loadtest("--model=tiny", "--duration=1", "--warmup=0.1", f"--url={target.url}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
    assert reported(done.stdout, "requests answered") > 40 / (8 if "multi" in str(flags) else 1)


def test_a_mix_is_asked_by_weight(target: RunningServer, tmp_path: Path) -> None:
    done = loadtest(
        "--model=tiny=3", "--model=slow:1", "--rate=200", "--duration=2", f"--json={tmp_path / 'mix.json'}",
        f"--url={target.url}", "--fail-on=slow:p99>10s",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout + done.stderr
    result = read_result(tmp_path / "mix.json")
    shares = {name: figures.offered / result.total.offered for name, figures in result.per_model.items()}
    assert shares["tiny"] == pytest.approx(0.75, abs=0.1)
    assert {m["name"]: m["weight"] for m in result.models} == {"tiny": 3.0, "slow": 1.0}
    assert re.search(r"^slow +\d+ ", done.stdout, re.MULTILINE)


def test_a_trace_is_sent_as_it_was_recorded(target: RunningServer, tmp_path: Path) -> None:
    lines = [f"{n / 100},{'slow' if n % 4 == 0 else 'tiny'}" for n in range(100)]
    (tmp_path / "trace.csv").write_text("timestamp,model\n" + "\n".join(lines))
    done = loadtest(
        "--model=tiny", "--model=slow", f"--trace={tmp_path / 'trace.csv'}", f"--url={target.url}",
        f"--json={tmp_path / 'run.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run.json")
    assert {name: figures.answered for name, figures in result.per_model.items()} == {"tiny": 75, "slow": 25}
    assert result.total.seconds == pytest.approx(0.99)


def test_models_are_reloaded_under_load(target: RunningServer, tmp_path: Path) -> None:
    done = loadtest(
        "--model=tiny", "--scenario=reload", "--rate=100", "--duration=3", "--reload-every=0.3",
        "--fail-on=errors>0", "--fail-on=reloads<3", "--fail-on=failed_reloads>0", f"--url={target.url}",
        f"--json={tmp_path / 'run.json'}",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout
    result = read_result(tmp_path / "run.json")
    assert (result.total.failed, result.extras["reloads"] >= 3) == (0, True)


def test_an_overload_is_offered_a_multiple_of_the_capacity(start_stub: Callable[..., str]) -> None:
    """10 ms a request are 100 requests/s; after half a second of queueing the stub works for nobody."""
    url = start_stub("--service-ms=10")
    done = loadtest(
        "--model=stub", "--scenario=overload", "--times=3", "--duration=2", "--timeout=0.5", f"--url={url}",
        "--fail-on=goodput_ratio>0.9",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert reported(done.stdout, "  DEADLINE_EXCEEDED") > 100
    assert float(re.findall(r"capacity: ([\d.]+) requests/s", done.stdout)[0]) == pytest.approx(100, rel=0.1)
    assert reported(done.stdout, "goodput_ratio") < 0.9


def test_a_soak_watches_the_servers_memory(target: RunningServer, tmp_path: Path) -> None:
    done = loadtest(
        "--model=tiny", "--scenario=soak", "--rate=50", "--duration=2", f"--url={target.url}",
        f"--metrics-url=http://127.0.0.1:{target.metrics_port}/metrics", f"--json={tmp_path / 'run.json'}",
        "--fail-on=memory_growth>500",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert read_result(tmp_path / "run.json").extras["memory_peak"] > 10


def test_a_condition_that_is_met_fails_the_run(target: RunningServer) -> None:
    done = loadtest("--model=tiny", "--rate=50", "--duration=1", "--fail-on=errors<=0", f"--url={target.url}")
    assert done.returncode == 1
    assert "FAILED fail on errors<=0" in done.stdout
    assert "verdict: FAILED" in done.stdout


def test_a_run_that_can_not_be_believed_has_no_verdict(start_stub: Callable[..., str]) -> None:
    """1 000 requests/s of a server that answers 100."""
    url = start_stub("--service-ms=10")
    done = loadtest("--model=stub", "--rate=300", "--duration=1", "--fail-on=errors>0", f"--url={url}")
    assert done.returncode == 3, done.stdout
    assert "INVALID: achieved" in done.stdout
    assert "verdict: INVALID" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--users=0",), "--users is 0, expected more than 0"),
        (("--rate=0",), "expected more than 0 requests/s"),
        (("--rate=fast",), "--rate is 'fast', expected 200, or 100:500"),
        (("--rate=10", "--users=3"), "choose one of them"),
        (("--scenario=server",), "needs --rate"),
        (("--scenario=single-stream", "--users=3"), "has one user"),
        (("--duration=0",), "--duration is 0, expected more than 0"),
        (("--batch-size=0",), "--batch-size is 0"),
        (("--model=tiny",), "names a model twice"),
        (("--fail-on=p99",), "expected METRIC<VALUE"),
        (("--shape=x",), "'x': expected NAME:VALUE"),
        (("--trace=nothing.csv",), "nothing.csv"),
        (("--rate=1e9", "--duration=1000"), "at most 50000000 fit into a run"),
    ],
)
def test_what_makes_no_run_is_refused_in_one_line(
    target: RunningServer, flags: tuple[str, ...], message: str
) -> None:
    done = loadtest("--model=tiny", f"--url={target.url}", *flags)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_errors_are_counted_by_status_with_what_the_server_said(target: RunningServer) -> None:
    # 1000 rows of 4 floats are over the 4096 bytes that this server takes.
    done = loadtest("--model=tiny", "--users=1", "--duration=1", "--batch-size=1000", f"--url={target.url}")
    assert done.returncode == 1
    assert reported(done.stdout, "requests answered") == 0
    assert reported(done.stdout, "  RESOURCE_EXHAUSTED") == reported(done.stdout, "failed") > 0
    assert "4096" in done.stdout


def test_some_errors_are_some_errors(start_stub: Callable[..., str]) -> None:
    url = start_stub("--status=INTERNAL", "--fail-every=4")
    done = loadtest(
        "--model=stub", "--rate=200", "--duration=1", "--arrivals=constant", "--warmup=0", f"--url={url}",
        "--fail-on=errors>20%",
    )  # fmt: skip
    assert done.returncode == 1
    assert (reported(done.stdout, "  INTERNAL"), reported(done.stdout, "requests answered")) == (50, 150)
    assert "the stub was told to" in done.stdout


@pytest.mark.parametrize("load", ["--rate=100", "--users=4"])
def test_a_server_that_dies_in_the_middle_is_reported(
    tmp_path: Path, serve: Callable[..., RunningServer], load: str
) -> None:
    write_model(tmp_path / "models" / "tiny", scaled(1))
    server = serve("--model-repository", tmp_path / "models")
    command = [
        sys.executable, "-m", "loadtest", "--model=tiny", load, "--duration=3", f"--url={server.url}",
        "--fail-on=errors>0", "--warmup=0",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while server_count(server) < 50:
            assert process.poll() is None
        server.stop(signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors + output) == (1, False), errors
    assert reported(output, "  UNAVAILABLE") > 0
    assert reported(output, "requests answered") >= 50 - 1
    assert "note: statistics of 'tiny'" in output


def test_a_server_that_is_down_is_one_line() -> None:
    done = loadtest("--model=tiny", "--rate=10", "--url=127.0.0.1:1")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "127.0.0.1:1: UNAVAILABLE" in done.stderr
    waited = loadtest("--model=tiny", "--rate=10", "--url=127.0.0.1:1", "--wait=0.5")
    assert (waited.returncode, "nothing answers within 0.5 s" in waited.stderr) == (1, True)


def test_an_unknown_model_is_one_line(target: RunningServer) -> None:
    done = loadtest("--model=nope", f"--url={target.url}")
    assert (done.returncode, len(done.stderr.splitlines()), "NOT_FOUND" in done.stderr) == (1, 1, True)


def test_a_file_that_can_not_be_written_is_one_line(target: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ("--model=tiny", "--rate=20", "--duration=0.5", f"--json={tmp_path / 'file' / 'run.json'}")
    done = loadtest(*flags, f"--url={target.url}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr


def test_tls_and_tokens_are_used_and_their_refusal_is_one_line(
    tmp_path: Path, serve: Callable[..., RunningServer]
) -> None:
    write_model(tmp_path / "models" / "tiny", scaled(1))
    right, wrong = Authority(tmp_path / "right"), Authority(tmp_path / "wrong")
    pair, client = right.issue("server"), right.issue("client")
    tokens = tmp_path / "tokens"
    tokens.write_text("# of a client\nsecret-0123456789abcdef\n")
    tokens.chmod(0o600)
    server = serve(
        "--model-repository", tmp_path / "models",
        "--grpc-use-ssl-mutual", f"--grpc-server-cert={pair.certificate}",
        f"--grpc-server-key={pair.key}", f"--grpc-root-cert={right.root}", f"--auth-token-file={tokens}",
    )  # fmt: skip
    base = ("--model=tiny", "--rate=50", "--duration=1", f"--url=localhost:{server.grpc_port}")
    shown = (f"--client-cert={client.certificate}", f"--client-key={client.key}", f"--token-file={tokens}")
    good = loadtest(*base, f"--root-cert={right.root}", *shown)
    assert good.returncode == 0, good.stderr
    assert reported(good.stdout, "requests answered") > 20
    refused: dict[str, list[tuple[str, ...]]] = {
        "UNAVAILABLE": [(), (f"--root-cert={wrong.root}", *shown), (f"--root-cert={right.root}", shown[2])],
        "UNAUTHENTICATED": [(f"--root-cert={right.root}", *shown[:2])],
    }
    for status, attempts in refused.items():
        for flags in attempts:
            done = loadtest(*base, *flags)
            assert (done.returncode, len(done.stderr.splitlines()), status in done.stderr) == (1, 1, True), (
                done.stderr
            )


def test_ctrl_c_ends_a_run_with_what_there_is(target: RunningServer, tmp_path: Path) -> None:
    before = server_count(target)
    command = [
        sys.executable, "-m", "loadtest", "--model=tiny", "--rate=100", "--duration=100",
        f"--url={target.url}", f"--json={tmp_path / 'run.json'}", "--warmup=0", "--fail-on=errors>0",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while server_count(target) < before + 50:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (3, False), errors
    assert "INVALID: it was interrupted" in output
    assert 0 < read_result(tmp_path / "run.json").total.seconds < 99


def test_a_written_result_can_be_reported_again(target: RunningServer, tmp_path: Path) -> None:
    first = loadtest(
        "--model=tiny", "--rate=50", "--duration=1", f"--json={tmp_path / 'run.json'}", f"--url={target.url}"
    )
    again = loadtest("report", tmp_path / "run.json", f"--html={tmp_path / 'run.html'}")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[:10] == first.stdout.splitlines()[1:11]
    assert "</html>" in (tmp_path / "run.html").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["format"] == 1


def test_the_client_checks_itself() -> None:
    done = loadtest("selfcheck", "--seconds=0.5")
    assert done.returncode in (0, 1), done.stderr  # 1: this machine is too busy for any rate
    assert re.search(r"^one at a time +0\.\d{3} ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^floor: .* \d\.\d{3} ms \(median", done.stdout, re.MULTILINE)
    ceiling = re.search(
        r"^ceiling: (\d+ requests/s with 1 process; beyond it|none)", done.stdout, re.MULTILINE
    )
    assert ceiling
    assert (done.returncode == 0) == (ceiling[1] != "none")
