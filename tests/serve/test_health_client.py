"""`onnxedge health`: its exit status is all that a container engine reads of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serve.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]
TOKEN = "alice-0123456789"  # noqa: S105 - a test's


def health(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a container engine does: nothing but the server's variables in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ONNXEDGE_")}
    return subprocess.run(
        [sys.executable, "-m", "serve", "health", *map(str, words)],
        cwd=ROOT, env=clean | variables, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_a_server_that_is_ready_is_healthy_and_so_is_its_model(server: RunningServer) -> None:
    whole = health("--url", server.url)
    assert (whole.returncode, whole.stdout) == (0, "SERVING\n")
    assert health("versions", "--url", server.url).returncode == 0


def test_the_port_is_the_one_that_the_servers_variable_names(server: RunningServer) -> None:
    assert health(ONNXEDGE_GRPC_PORT=str(server.grpc_port)).returncode == 0


def test_an_unknown_model_is_not_healthy(server: RunningServer) -> None:
    done = health("nobody", "--url", server.url)
    assert done.returncode == 1
    assert "NOT_FOUND" in done.stderr


def test_a_server_with_a_broken_model_is_not_healthy(
    broken_repository: Path, serve: Callable[..., RunningServer]
) -> None:
    broken = serve("--model-repository", broken_repository)
    done = health("--url", broken.url)
    assert (done.returncode, done.stdout) == (1, "NOT_SERVING\n")
    assert health("good", "--url", broken.url).returncode == 0
    broken.stop()


def test_nobody_there_is_one_line_and_status_1() -> None:
    done = health("--url", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "UNAVAILABLE" in done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("health") / "ca")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("health") / "tokens"
    path.write_text(f"# for the health check\n\n{TOKEN}\nbob-012345678901\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(
    authority: Authority, token_file: Path, repository: Path, serve: Callable[..., RunningServer]
) -> RunningServer:
    """A server with mutual TLS and tokens."""
    pair = authority.issue("server")
    flags = [f"--grpc-server-cert={pair.certificate}", f"--grpc-server-key={pair.key}"]
    flags += ["--grpc-use-ssl-mutual", f"--grpc-root-cert={authority.root}"]
    return serve("--model-repository", repository, f"--auth-token-file={token_file}", *flags)


def test_tls_and_tokens(guarded: RunningServer, authority: Authority, token_file: Path) -> None:
    client = authority.issue("health")
    shown = ("--root-cert", authority.root, "--client-cert", client.certificate, "--client-key", client.key)
    url = ("--url", f"localhost:{guarded.grpc_port}")
    assert health(*url, *shown, "--token-file", token_file).returncode == 0
    assert health(*url, *shown, ONNXEDGE_AUTH_TOKEN_FILE=str(token_file)).returncode == 0
    assert health(*url, *shown, "--header", f"authorization: Bearer {TOKEN}").returncode == 0
    assert (
        health(*url, "--token-file", token_file, ONNXEDGE_HEALTH_FLAGS=shlex.join(map(str, shown))).returncode
        == 0
    )
    assert "UNAUTHENTICATED" in health(*url, *shown).stderr
    plain = health(*url, "--token-file", token_file)
    assert (plain.returncode, "--root-cert" in plain.stderr) == (1, True), "plain text where TLS is spoken"


def test_a_certificate_for_another_name_than_the_urls(
    guarded: RunningServer, authority: Authority, token_file: Path
) -> None:
    client = authority.issue("health")
    shown = ("--root-cert", authority.root, "--client-cert", client.certificate, "--client-key", client.key)
    flags = ("--token-file", token_file, "--url", f"127.0.0.1:{guarded.grpc_port}", *shown)
    assert health(*flags, "--ssl-server-name", "example.org").returncode == 1
    assert health(*flags, "--ssl-server-name", "localhost").returncode == 0


def test_a_token_file_that_cannot_be_used(tmp_path: Path) -> None:
    missing = health("--token-file", tmp_path / "nothing")
    assert (missing.returncode, "No such file" in missing.stderr) == (1, True)
    (tmp_path / "empty").write_text("# nobody\n")
    empty = health("--token-file", tmp_path / "empty")
    assert (empty.returncode, "holds no token" in empty.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--client-cert", "client.pem"], "--client-cert and --client-key go together"),
        (
            ["--client-key", "client.key", "--root-cert", "ca.pem"],
            "--client-cert and --client-key go together",
        ),
        (["--timeout", "0"], "--timeout: expected above 0"),
        (["--url", "http://localhost:8001"], "expected HOST:PORT"),
    ],
)
def test_flags_that_cannot_be_are_said(words: list[str], said: str) -> None:
    done = health(*words)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_variable_that_is_no_command_line_is_named() -> None:
    done = health(ONNXEDGE_HEALTH_FLAGS="--header 'x")
    assert done.returncode == 2
    assert "ONNXEDGE_HEALTH_FLAGS" in done.stderr.splitlines()[-1]
