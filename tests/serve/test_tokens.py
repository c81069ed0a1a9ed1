"""Bearer tokens: what a token file may hold, and who gets in with which metadata."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.settings import ServerSettings, SettingsError
from serve.transport.security import Security
from serve.transport.security.tokens import Tokens, bearer_token
from tests.graphs import scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

ALICE, BOB = "alice-0123456789", "bob~0123456789+/=="


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# for Alice\n{ALICE}\n\n  {BOB}  \n")
    path.chmod(0o600)
    return path


def test_each_line_but_comments_is_a_token(file: Path) -> None:
    tokens = Tokens(file)
    assert tokens.accept(ALICE)
    assert tokens.accept(BOB)
    for wrong in ("", "# for Alice", ALICE[:-1], ALICE + "0", ALICE.upper(), f"{ALICE}\n{BOB}", "é" * 16):
        assert not tokens.accept(wrong)


def test_only_hashes_are_kept(file: Path) -> None:
    tokens = Tokens(file)
    (first, second) = tokens._hashes.content
    assert {len(first), len(second)} == {32}
    assert ALICE.encode() not in (first, second)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds 0 tokens, expected 1 to 1000"),
        ("# nobody\n\n", "holds 0 tokens"),
        (f"{ALICE}\ntoo-short", "line 2: expected 16 characters or more"),
        ("one two three four five", "line 1: expected letters, digits and"),
        ("é" * 16, "line 1: expected letters, digits and"),
        ("\n".join(f"{number:016}" for number in range(1001)), "holds 1001 tokens"),
        ("#" * (2 << 20), "has more than 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_refused_and_its_lines_are_not_repeated(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Tokens(file)
    message = str(caught.value)
    assert message.startswith(f"--auth-token-file {file}")
    assert problem in message
    assert "too-short" not in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="none: No such file or directory"):
        Tokens(tmp_path / "none")


def test_a_changed_file_counts_within_a_second_and_a_wrong_one_does_not(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tokens = Tokens(file, clock)
    file.write_text("carol-0123456789")
    clock.now += 0.9
    assert tokens.accept(ALICE)
    clock.now += 0.2
    assert [tokens.accept(token) for token in (ALICE, "carol-0123456789")] == [False, True]
    file.write_text("short")
    for _ in range(3):
        clock.now += 2
        assert tokens.accept("carol-0123456789")
    assert caplog.text.count("line 1: expected 16 characters or more; what was read before stays") == 1
    file.unlink()
    clock.now += 2
    assert tokens.accept("carol-0123456789")
    file.write_text(ALICE)
    clock.now += 2
    assert [tokens.accept(token) for token in (ALICE, "carol-0123456789")] == [True, False]


@pytest.mark.parametrize(
    ("metadata", "token"),
    [
        ([("authorization", "Bearer abc")], "abc"),
        ([("user-agent", "x"), ("authorization", "bearer  abc ")], "abc"),
        ([], None),
        ([("authorization", "abc")], None),
        ([("authorization", "Bearer ")], None),
        ([("authorization", "Basic abc")], None),
        ([("authorization", "Bearer abc"), ("authorization", "Bearer def")], None),
        ([("authorization", b"Bearer abc")], None),
    ],
)
def test_the_token_of_a_request(metadata: list[tuple[str, str | bytes]], token: str | None) -> None:
    assert bearer_token(metadata) == token


@pytest.mark.parametrize(
    ("address", "warnings"), [("192.0.2.1", 1), ("::", 1), ("example.org", 1), ("::1", 0), ("127.0.0.1", 0)]
)
def test_tokens_in_plain_text_on_a_network_are_warned_of(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, address: str, warnings: int
) -> None:
    settings = ServerSettings(model_repository=(tmp_path,), grpc_address=address, auth_token_file=str(file))
    assert len(Security(settings).interceptors) == 1
    assert caplog.text.count("cross the network") == warnings


def test_a_token_file_that_everyone_can_read_is_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Tokens(file)
    assert caplog.text == ""
    file.chmod(0o644)
    Tokens(file)
    assert f"--auth-token-file {file} can be read by every user" in caplog.text


def test_without_rules_nothing_is_in_the_way(tmp_path: Path) -> None:
    assert Security(ServerSettings(model_repository=(tmp_path,))).interceptors == []


@pytest.fixture
def server(file: Path, tmp_path: Path, serve: Callable[..., RunningServer]) -> Iterator[RunningServer]:
    write_model(tmp_path / "models" / "double", scaled(2))
    flags = (f"--auth-token-file={file}", "--log-verbose=1")
    server = serve("--model-repository", tmp_path / "models", *flags)
    yield server
    assert server.stop() == 0
    assert not any(token in "".join(server.log) for token in (ALICE, BOB, "guess"))


def test_only_who_sends_a_token_is_answered(server: RunningServer, file: Path) -> None:
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)

        def ask(*metadata: tuple[str, str]) -> tuple[str, str]:
            try:
                stub.ServerReady(pb.ServerReadyRequest(), metadata=metadata, timeout=30)
            except grpc.RpcError as error:
                return error.code().name, error.details() or ""
            return "OK", ""

        assert ask(("authorization", f"Bearer {ALICE}"))[0] == "OK"
        for metadata in ([], [("authorization", f"Basic {ALICE}")], [("x-authorization", f"Bearer {ALICE}")]):
            code, details = ask(*metadata)
            assert (code, "authorization: Bearer TOKEN" in details) == ("UNAUTHENTICATED", True)
        code, details = ask(("authorization", "Bearer guess-0123456789"))
        assert (code, "guess" in details, "not known" in details) == ("UNAUTHENTICATED", False, True)
        # A token that is withdrawn stops, and a new one begins, while the server runs.
        file.write_text("carol-0123456789")
        end = time.monotonic() + 30
        while ask(("authorization", "Bearer carol-0123456789"))[0] != "OK":
            assert time.monotonic() < end, "the file was not read again"
            time.sleep(0.05)  # each refusal is a line in the log, which nobody reads until the end
        assert ask(("authorization", f"Bearer {ALICE}"))[0] == "UNAUTHENTICATED"


def test_health_is_open_where_the_flag_says_so(
    file: Path, tmp_path: Path, serve: Callable[..., RunningServer]
) -> None:
    """For kubelet's probes, proxies, and `round_robin` with its health check, none of which sends a token."""
    write_model(tmp_path / "models" / "double", scaled(2))
    server = serve(
        "--model-repository", tmp_path / "models", f"--auth-token-file={file}", "--auth-health=false"
    )
    policy = (Path(__file__).parents[2] / "deploy" / "proxy" / "round_robin.json").read_text()
    with grpc.insecure_channel(server.url, [("grpc.service_config", policy)]) as channel:
        health: Any = HealthStub(channel)
        assert health.Check(HealthCheckRequest(), timeout=30).status == HealthCheckResponse.SERVING
        stub: Any = GRPCInferenceServiceStub(channel)
        metadata = [("authorization", f"Bearer {ALICE}")]
        assert stub.ServerReady(pb.ServerReadyRequest(), metadata=metadata, timeout=30).ready
        with pytest.raises(grpc.RpcError) as refused:
            stub.ServerReady(pb.ServerReadyRequest(), timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    server.stop()
