"""`onnxedge generate` as its user meets it: the terminal, pipes, signals, and what it says when it can't."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import serve.__main__ as onnxedge
from serve.generate_client.command import main
from tests.serve.generate.conftest import ALPHABET
from tests.serve.generate.generation_client import greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[3]
PROMPT = "ROMEO: "
GREEDY = ("--temperature", "0")


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "serve", "generate", *map(str, words)]


def onnxedge_generate(*words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*words), cwd=ROOT, input=stdin, capture_output=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def server(serve: Callable[..., RunningServer], generation_repository: Path) -> Iterator[RunningServer]:
    running = serve("--model-repository", generation_repository)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def written(generation_graph: Path) -> str:
    """What the graph itself writes after the prompt."""
    ids = greedy(generation_graph, [ALPHABET.index(character) for character in PROMPT], 60)
    return "".join(ALPHABET[token] for token in ids)


@pytest.mark.parametrize("model", ["gpt", "gpt_unary", "once"])
def test_the_text_follows_its_prompt_streamed_or_not(server: RunningServer, written: str, model: str) -> None:
    flags = ("--url", server.url, *GREEDY, "--max-tokens", "40")
    done = onnxedge_generate(model, PROMPT, *flags)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == PROMPT + written[:40] + "\n"
    assert onnxedge_generate(model, PROMPT, *flags, "--no-echo").stdout.decode() == written[:40] + "\n"


@pytest.mark.parametrize("words", [("gpt",), ("gpt", "-")])
def test_a_prompt_comes_from_the_standard_input_as_it_is(
    server: RunningServer, written: str, words: tuple[str, ...]
) -> None:
    flags = ("--url", server.url, *GREEDY, "--max-tokens", "9")
    assert (
        onnxedge_generate(*words, *flags, stdin=PROMPT.encode()).stdout.decode() == f"{PROMPT}{written[:9]}\n"
    )
    assert b"the prompt is not UTF-8" in onnxedge_generate(*words, *flags, stdin=b"\xff").stderr
    assert b"the prompt is empty" in onnxedge_generate(*words, *flags).stderr


@pytest.mark.parametrize("model", ["gpt", "ids"])
def test_ids_are_answered_with_ids(
    server: RunningServer, generation_graph: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert main([model, "--ids", "7 8, 9", "--url", server.url, *GREEDY, "--max-tokens", "12"]) == 0
    found = [int(number) for number in capsys.readouterr().out.split()]
    assert found == [7, 8, 9, *greedy(generation_graph, [7, 8, 9], 12)]


def test_a_seed_and_a_stop_are_the_servers(
    server: RunningServer, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--url", server.url, "--no-echo", "--max-tokens", "30"]
    stop = written[10:12]
    assert main(["gpt", PROMPT, *flags, *GREEDY, "--stop", stop]) == 0
    assert capsys.readouterr().out == written[: written.index(stop)] + "\n"
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["gpt", PROMPT, *flags, "--temperature", "2", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("model", ["gpt", "once"])
def test_statistics_go_to_the_error_stream(
    server: RunningServer, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert main([model, PROMPT, "--url", server.url, *GREEDY, "--max-tokens", "20", "--stats"]) == 0
    said = capsys.readouterr().err
    speed = r": the first after [\d.]+ s, then [\d.]+ tokens/s" if model == "gpt" else ""
    pattern = rf"onnxedge generate: 20 tokens after 7 in [\d.]+ s{speed}; ended by length\n"
    assert re.fullmatch(pattern, said), said


def test_text_is_shown_as_it_comes_and_ctrl_c_ends_it(server: RunningServer) -> None:
    before = metric(server, "generation_tokens_total")
    process = subprocess.Popen(
        command("gpt", PROMPT, "--url", server.url, "--max-tokens", "8000"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.read(len(PROMPT) + 5)
    assert process.poll() is None  # the text has only begun
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, b"")
    assert first.startswith(PROMPT.encode())
    assert rest.endswith(b"\n")
    wait_until_none_runs(server)
    assert metric(server, "generation_tokens_total") - before < 8000


def metric(server: RunningServer, name: str) -> float:
    """Of the model gpt."""
    found = re.search(
        rf'^onnxedge_{name}\{{[^}}]*model="gpt"[^}}]*\}} (\S+)$', server.metrics(), re.MULTILINE
    )
    assert found, server.metrics()
    return float(found[1])


def wait_until_none_runs(server: RunningServer) -> None:
    """Ask until the server has noticed that its client has gone; the test's own timeout bounds it."""
    while metric(server, "num_requests_running"):
        pass


def test_a_reader_that_has_enough_ends_it(server: RunningServer) -> None:
    process = subprocess.Popen(
        command("gpt", PROMPT, "--url", server.url, "--max-tokens", "8000"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
@pytest.mark.parametrize("words", [(), ("--no-echo", "--ids")])
def test_a_full_disk_is_said_in_one_line(server: RunningServer, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command("gpt", "1 2", "--url", server.url, "--max-tokens", "3", *words),
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(rb"onnxedge generate: .*No space left on device\n", done.stderr), done.stderr


def test_a_prompt_is_utf_8_in_a_locale_that_is_not(server: RunningServer) -> None:
    done = subprocess.run(
        command("gpt", "Grüße", "--url", server.url, "--max-tokens", "3", *GREEDY), cwd=ROOT,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Gr??e")


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "interrupted_import.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(onnxedge._COMMANDS, "generate", "interrupted_import")
    assert onnxedge.main(["generate", "gpt", "a"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope", "a"], "NOT_FOUND: Request for unknown model: 'nope'"),
        (["gpt", "a", "--version", "7"], "NOT_FOUND"),
        (["bytes", "a" * 100, "--max-tokens", "500"], "together 600, expected 512 at most"),
        (["gpt", "a", "--temperature", "-1"], "temperature"),
        (["once", "a" * 100, "--max-tokens", "500"], "together 600, expected 512 at most"),
        (["ids", "a"], "model 'ids' has no tokenizer and takes token ids alone: use --ids"),
        (["gpt", "a", "--root-cert", "/nowhere.pem"], "No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    server: RunningServer, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([*words, "--url", server.url]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("onnxedge generate: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_text_that_takes_too_long_is_cut_off(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    # Either side may notice first.
    assert main(["gpt", PROMPT, "--url", server.url, "--max-tokens", "8000", "--timeout", "0.3"]) == 1
    captured = capsys.readouterr()
    assert "deadline" in captured.err.lower()
    assert captured.out == "" or captured.out.endswith("\n")
    wait_until_none_runs(server)


def test_no_server_and_no_prompt_are_said() -> None:
    done = onnxedge_generate("gpt", "a", "--url", "127.0.0.1:1", "--timeout", "5")
    assert done.returncode == 1
    assert b"127.0.0.1:1: UNAVAILABLE" in done.stderr
    assert b"Traceback" not in done.stderr
    assert onnxedge_generate("gpt", "a", "b").returncode == 2
