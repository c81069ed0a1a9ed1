"""TLS and mutual TLS: who gets in, what is refused at the start, certificates renewed while calls go on."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.settings import ServerSettings, SettingsError
from serve.transport.security.tls import server_credentials
from tests.graphs import scaled, write_model
from tests.serve.certificates import Authority, Pair, openssl

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "other")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tls_models")
    write_model(root / "double", scaled(2))
    return root


@pytest.fixture(scope="module")
def mutual(authority: Authority, models: Path, serve: Callable[..., RunningServer]) -> RunningServer:
    pair = authority.issue("mutual")
    flags = [f"--grpc-server-cert={pair.certificate}", f"--grpc-server-key={pair.key}"]
    flags += ["--grpc-use-ssl-mutual", f"--grpc-root-cert={authority.root}"]
    return serve("--model-repository", models, *flags)


def secured(server: RunningServer, root: Path, client: Pair | None = None) -> grpc.Channel:
    """A connection of its own that trusts a root, and shows a certificate where there is one."""
    shown = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(root.read_bytes(), *shown)
    return grpc.secure_channel(server.url, credentials, OWN_CONNECTION)


def ask(channel: grpc.Channel) -> str:
    """ServerLive's status."""
    stub: Any = GRPCInferenceServiceStub(channel)
    try:
        assert stub.ServerLive(pb.ServerLiveRequest(), timeout=20).live
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def connect_and_ask(server: RunningServer, root: Path, client: Pair | None = None) -> str:
    with secured(server, root, client) as channel:
        return ask(channel)


def test_mutual_tls_lets_in_who_shows_a_certificate_of_its_root(
    mutual: RunningServer, authority: Authority, other: Authority
) -> None:
    right = authority.issue("client")
    assert connect_and_ask(mutual, authority.root, right) == "OK"
    assert connect_and_ask(mutual, authority.root) == "UNAVAILABLE"
    assert connect_and_ask(mutual, authority.root, other.issue("client")) == "UNAVAILABLE"
    assert connect_and_ask(mutual, other.root, right) == "UNAVAILABLE"
    late = authority.issue("late", starts=-7200, ends=-3600)
    assert connect_and_ask(mutual, authority.root, late) == "UNAVAILABLE"
    early = authority.issue("early", starts=3600, ends=7200)
    assert connect_and_ask(mutual, authority.root, early) == "UNAVAILABLE"
    with grpc.insecure_channel(mutual.url, OWN_CONNECTION) as channel:
        assert ask(channel) == "UNAVAILABLE"


def test_tritonclient_connects_over_mutual_tls(mutual: RunningServer, authority: Authority) -> None:
    client = authority.issue("triton")
    files = [str(file) for file in (authority.root, client.key, client.certificate)]
    script = (
        "import sys, tritonclient.grpc as triton\n"
        "url, *files = sys.argv[1:]\n"
        "with triton.InferenceServerClient(url, False, True, *files) as client:\n"
        "    print(client.is_server_live(), client.is_model_ready('double'))\n"
    )
    command = [sys.executable, "-c", script, mutual.url, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "True True\n", done.stderr


@pytest.fixture
def renewed(
    authority: Authority, models: Path, serve: Callable[..., RunningServer], tmp_path: Path
) -> tuple[RunningServer, Pair]:
    """A server with TLS alone, and its files, to be replaced."""
    files = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    replace_files(files, authority.issue("first"))
    flags = [f"--grpc-server-cert={files.certificate}", f"--grpc-server-key={files.key}"]
    return serve("--model-repository", models, "--grpc-use-ssl=true", *flags), files


def replace_files(files: Pair, new: Pair) -> None:
    """Put new files in the place of others, each in one step."""
    for target, source in ((files.certificate, new.certificate), (files.key, new.key)):
        copy = target.with_name("new")
        shutil.copyfile(source, copy)
        copy.chmod(0o600)
        copy.replace(target)


def test_new_connections_get_the_renewed_certificate_and_open_ones_go_on(
    renewed: tuple[RunningServer, Pair], authority: Authority, other: Authority
) -> None:
    server, files = renewed
    with secured(server, authority.root) as open_channel:
        assert ask(open_channel) == "OK"
        assert connect_and_ask(server, other.root) == "UNAVAILABLE"
        replace_files(files, other.issue("second"))
        assert connect_and_ask(server, other.root) == "OK"
        assert connect_and_ask(server, authority.root) == "UNAVAILABLE"
        assert ask(open_channel) == "OK"
    assert server.stop() == 0


def test_a_broken_renewal_leaves_the_old_certificate_and_is_logged_once(
    renewed: tuple[RunningServer, Pair], authority: Authority
) -> None:
    server, files = renewed
    # As a renewal looks that replaces the certificate first, and the key a moment later.
    new = authority.issue("third")
    shutil.copyfile(new.certificate, files.certificate)
    for _ in range(3):
        assert connect_and_ask(server, authority.root) == "OK"
    files.key.unlink()
    assert connect_and_ask(server, authority.root) == "OK"
    shutil.copyfile(new.key, files.key)
    assert connect_and_ask(server, authority.root) == "OK"
    shown = ssl.get_server_certificate(("127.0.0.1", server.grpc_port))
    assert shown.strip() == new.certificate.read_text().strip()
    assert server.stop() == 0
    log = "".join(server.log)
    assert log.count("does not belong to") == 1
    assert log.count("server.key: No such file or directory; what was read before stays in force") == 1


def test_clients_refuse_a_server_whose_certificate_has_expired(
    renewed: tuple[RunningServer, Pair], other: Authority
) -> None:
    server, files = renewed
    replace_files(files, other.issue("short", ends=3))
    assert connect_and_ask(server, other.root) == "OK"
    end = time.monotonic() + 30
    while connect_and_ask(server, other.root) == "OK":
        assert time.monotonic() < end, "an expired certificate is still taken"


@pytest.fixture
def settings(authority: Authority, models: Path) -> ServerSettings:
    """Mutual TLS with files that are right."""
    pair = authority.issue("settings")
    return ServerSettings(
        model_repository=(models,),
        grpc_use_ssl_mutual=True,
        grpc_server_cert=str(pair.certificate),
        grpc_server_key=str(pair.key),
        grpc_root_cert=str(authority.root),
    )


def refusal(settings: ServerSettings, **changes: Any) -> str:
    assert server_credentials(settings) is not None
    with pytest.raises(SettingsError) as caught:
        server_credentials(replace(settings, **{name: str(value) for name, value in changes.items()}))  # type: ignore[arg-type]
    return str(caught.value)


def test_no_tls_without_the_flags(models: Path) -> None:
    assert server_credentials(ServerSettings(model_repository=(models,))) is None


@pytest.mark.parametrize("name", ["grpc_server_cert", "grpc_server_key", "grpc_root_cert"])
def test_each_file_must_be_named_and_there(settings: ServerSettings, tmp_path: Path, name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert refusal(settings, **{name: ""}) == f"{flag} is missing: --grpc-use-ssl-mutual needs it"
    message = refusal(settings, **{name: tmp_path / "none.pem"})
    assert message == f"{flag} {tmp_path / 'none.pem'}: No such file or directory"
    (tmp_path / "text").write_text("no PEM")
    assert f"{flag} {tmp_path / 'text'} " in refusal(settings, **{name: tmp_path / "text"})
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    assert "has more than 1048576 bytes" in refusal(settings, **{name: tmp_path / "large"})


def test_a_certificate_that_is_not_valid_now_is_refused_at_the_start(
    settings: ServerSettings, authority: Authority
) -> None:
    late = authority.issue("expired", starts=-7200, ends=-3600)
    message = refusal(settings, grpc_server_cert=late.certificate, grpc_server_key=late.key)
    assert message == f"--grpc-server-cert {late.certificate}: certificate has expired"
    early = authority.issue("future", starts=3600, ends=7200)
    message = refusal(settings, grpc_server_cert=early.certificate, grpc_server_key=early.key)
    assert message == f"--grpc-server-cert {early.certificate}: certificate is not yet valid"


def test_a_key_of_another_certificate_or_with_a_passphrase_is_refused(
    settings: ServerSettings, other: Authority, tmp_path: Path
) -> None:
    wrong = other.issue("wrong").key
    message = refusal(settings, grpc_server_key=wrong)
    assert f"--grpc-server-key {wrong} does not belong to --grpc-server-cert" in message
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", settings.grpc_server_key, "-aes128", "-passout", "pass:secret", "-out", locked)
    assert "is not a private key in PEM without a passphrase" in refusal(settings, grpc_server_key=locked)


def test_who_names_a_certificate_does_not_get_plain_text(settings: ServerSettings) -> None:
    with pytest.raises(SettingsError, match=r"--grpc-server-cert is given without --grpc-use-ssl"):
        server_credentials(replace(settings, grpc_use_ssl_mutual=False))


def test_what_weakens_tls_is_warned_of(settings: ServerSettings, caplog: pytest.LogCaptureFixture) -> None:
    shared = Path(settings.grpc_server_key + ".shared")
    shutil.copyfile(settings.grpc_server_key, shared)
    shared.chmod(0o644)
    server_credentials(
        replace(settings, grpc_use_ssl=True, grpc_use_ssl_mutual=False, grpc_server_key=str(shared))
    )
    assert "--grpc-root-cert has no effect without --grpc-use-ssl-mutual" in caplog.text
    assert f"--grpc-server-key {shared} can be read by every user" in caplog.text
    caplog.clear()
    server_credentials(settings)
    assert "can be read" not in caplog.text
