"""Write an entry of the model repository, whole or not at all.

NAME/config.pbtxt     Triton's ModelConfig
NAME/labels.txt       class names, one per line
NAME/N/model.onnx     the graph
NAME/N/golden.npz     samples to check a provider with, see `golden`
NAME/N/report.json    provenance and figures; "sha256" has every other file, by its path below NAME
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RENAME_EXCHANGE = 2
AT_FDCWD = -100


@dataclass(frozen=True)
class Entry:
    """What goes into a repository.

    Attributes:
        name: the folder's name.
        version: the version folder's.
        entry_files: file name to content, shared by all versions: config.pbtxt, labels.txt.
        version_files: file name to content: model.onnx, golden.npz.
        report: JSON values; "sha256" is added.
    """

    name: str
    version: int
    entry_files: Mapping[str, bytes]
    version_files: Mapping[str, bytes]
    report: Mapping[str, Any]


def golden(
    inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], tolerance: Mapping[str, float]
) -> bytes:
    """Samples to check any provider and precision with, as the bytes of an `.npz` file.

    Args:
        inputs: input name to rows [n, ...] as a client sends them; array `input.NAME`.
        outputs: output name to what the original network in torch answers, [n, ...]; array `output.NAME`.
        tolerance: output name to the largest absolute difference from the original that the exported graph
            showed on all held-out rows; array `tolerance.NAME`, FP32 without axes. A provider whose answers
            are further off computes something else.
    """
    buffer = io.BytesIO()
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    arrays |= {f"output.{name}": array for name, array in outputs.items()}
    arrays |= {f"tolerance.{name}": np.array(value, np.float32) for name, value in tolerance.items()}
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def write_entry(repository: Path, entry: Entry) -> Path:
    """Write a version and its entry's shared files.

    Everything is written and synced in a hidden folder of the repository, which servers skip, and then
    renamed. Whenever the exporter is killed, a reader finds the version as it was before or as it is after,
    never half of it, and never none where there was one. What a killed exporter leaves in hidden folders the
    next one removes.

    Returns:
        The version folder.

    Raises:
        ExportError: the version exists, and the file system can't swap two folders.
        OSError: the disk refused.
    """
    repository.mkdir(parents=True, exist_ok=True)
    with _lock(repository):
        for stale in repository.glob(f".{entry.name}.export-*"):
            shutil.rmtree(stale)
        new = Path(tempfile.mkdtemp(prefix=f".{entry.name}.export-", dir=repository))
        try:
            new.chmod(0o755)  # mkdtemp's 0700 would hide the entry from a server with its own user
            _write_files(new, entry)
            _publish(new, repository / entry.name, str(entry.version))
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return repository / entry.name / str(entry.version)


def _write_files(folder: Path, entry: Entry) -> None:
    version = str(entry.version)
    contents = dict(entry.entry_files)
    contents |= {f"{version}/{name}": content for name, content in entry.version_files.items()}
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    report = json.dumps({**entry.report, "sha256": digests}, indent=2, allow_nan=False) + "\n"
    contents[f"{version}/report.json"] = report.encode()
    (folder / version).mkdir()
    for path, content in contents.items():
        with (folder / path).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    _sync_folder(folder / version)
    _sync_folder(folder)


def _publish(new: Path, entry: Path, version: str) -> None:
    """Rename into place. The version comes last: a server that sees it finds the files it needs."""
    if not entry.exists():
        new.rename(entry)
        _sync_folder(entry.parent)
        return
    for path in sorted(new.iterdir()):
        if path.is_file():
            path.replace(entry / path.name)
    if (entry / version).exists():
        _exchange(new / version, entry / version)
    else:
        (new / version).rename(entry / version)
    _sync_folder(entry)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step: Linux's renameat2(2), flag RENAME_EXCHANGE.

    With two renames there would be a moment without the version, in which a polling server unloads it.

    Raises:
        ExportError: the file system can't (NFS, for one).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code not in {errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP}:
            raise OSError(code, os.strerror(code), str(second))
        raise ExportError(
            f"{second}: this version exists and the file system can't replace a folder in one step "
            f"({os.strerror(code)}); export a new version with --version, or remove this one first"
        )


@contextlib.contextmanager
def _lock(repository: Path) -> Iterator[None]:
    """One exporter at a time per repository; the kernel frees the lock of a killed one."""
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
