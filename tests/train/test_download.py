import hashlib
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from train.data import fashion_mnist
from train.data.download import DataError, cache_folder, fetch
from train.data.images import load_image_data

CONTENT = b"a data set" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts requests, and breaks off in the middle of files named cut-*."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if not self.path.startswith("/cut-"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100])

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that serves tmp_path / "site"."""
    (tmp_path / "site").mkdir()
    Handler.requests = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_fetched_once(site: str, tmp_path: Path) -> None:
    (tmp_path / "site" / "data.gz").write_bytes(CONTENT)
    for _ in range(2):
        fetch(site + "data.gz", tmp_path / "cache" / "toy" / "data.gz", DIGEST)
    assert (tmp_path / "cache" / "toy" / "data.gz").read_bytes() == CONTENT
    assert Handler.requests == 1


@pytest.mark.parametrize("name", ["data.gz", "cut-data.gz"])
def test_a_wrong_or_partial_download_is_deleted_and_named(site: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "site" / "data.gz").write_bytes(b"another file")
    with pytest.raises(
        DataError, match=f"/{name}: the download was partial or is another file, and was deleted"
    ):
        fetch(site + name, tmp_path / "cache" / name, DIGEST)
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cached_file_is_fetched_again(site: str, tmp_path: Path) -> None:
    (tmp_path / "site" / "data.gz").write_bytes(CONTENT)
    (tmp_path / "data.gz").write_bytes(CONTENT[:-1])
    fetch(site + "data.gz", tmp_path / "data.gz", DIGEST)
    assert (tmp_path / "data.gz").read_bytes() == CONTENT


def test_an_address_that_fails_is_named_with_the_way_out(site: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.gz: can't be fetched: .*404.*; fetch it by hand"):
        fetch(site + "absent.gz", tmp_path / "cache" / "absent.gz", DIGEST)
    assert not list((tmp_path / "cache").iterdir())


def test_only_web_addresses_are_fetched(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(CONTENT)
    with pytest.raises(ValueError, match="expected an http or https address"):
        fetch((tmp_path / "secret").as_uri(), tmp_path / "copy", DIGEST)
    assert not (tmp_path / "copy").exists()


def test_a_data_set_is_downloaded_into_the_cache_folder(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fashion_mnist.SAMPLE, tmp_path / "site", dirs_exist_ok=True)
    monkeypatch.setattr(fashion_mnist, "URL", site)
    monkeypatch.setattr(fashion_mnist, "SHA256", fashion_mnist.SAMPLE_SHA256)
    monkeypatch.setenv("ONNXEDGE_CACHE", str(tmp_path / "cache"))
    data = load_image_data("fashion_mnist", data_dir=None, sample=False)
    assert data.sha256() == fashion_mnist.load_sample().sha256()
    assert {path.name for path in (tmp_path / "cache" / "fashion_mnist").iterdir()} == set(
        fashion_mnist.SHA256
    )


def test_the_cache_is_in_the_users_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ONNXEDGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "onnxedge"
