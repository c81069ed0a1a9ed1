"""Fetch a data set's file into the cache folder, and check any file against its known sha256."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30


class DataError(Exception):
    """A data file that is missing, damaged or can't be fetched; the message names it and what to do."""


def cache_folder() -> Path:
    """Where downloads are kept: `$ONNXEDGE_CACHE`, or `~/.cache/onnxedge`."""
    return Path(os.environ.get("ONNXEDGE_CACHE") or Path.home() / ".cache" / "onnxedge")


def verify(path: Path, sha256: str) -> None:
    """Check a file's content.

    Raises:
        DataError: the file is missing or has another sha256.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data-dir names the folder with the data set's files")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise DataError(f"{path}: damaged or another file: sha256 {found}, expected {sha256}")


def fetch(url: str, path: Path, sha256: str) -> None:
    """Make sure that `path` holds the file of this sha256: keep it where it does, download it where not.

    The bytes go to a sibling file that takes the name `path` only after its sha256 is right.

    Args:
        url: http or https address.
        path: where the file belongs; its parents are made.
        sha256: hexadecimal digest of the file.

    Raises:
        DataError: the address can't be read, or what came has another sha256 (it is deleted).
    """
    try:
        verify(path, sha256)
    except DataError:
        path.unlink(missing_ok=True)
    else:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        _download(url, partial, path.name)
        verify(partial, sha256)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url}: can't be fetched: {error}; fetch it by hand and name its folder with --data-dir, "
            "or train on the offline sample, where the data set has one, with --sample"
        ) from error
    except DataError as error:
        raise DataError(
            f"{url}: the download was partial or is another file, and was deleted: {error}; try again"
        ) from error
    else:
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _download(url: str, path: Path, title: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: expected an http or https address")
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response,  # noqa: S310 - the scheme was checked above
        path.open("wb") as stream,
        tqdm(
            desc=title,
            total=int(response.headers.get("Content-Length") or 0) or None,
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        while chunk := response.read(CHUNK):
            stream.write(chunk)
            bar.update(len(chunk))
