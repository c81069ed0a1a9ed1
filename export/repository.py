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
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    tolerances: Mapping[str, Mapping[str, float]],
) -> bytes:
    """Samples to check any provider and precision with, as the bytes of an `.npz` file.

    Args:
        inputs: input name to rows [n, ...] as a client sends them; array `input.NAME`.
        outputs: output name to what the original network in torch answers, [n, ...]; array `output.NAME`.
        tolerances: file name of a graph to output name to the largest absolute difference from the original
            that the graph showed on all held-out rows; array `tolerance.FILE.NAME`, FP32 without axes. A
            provider whose answers are further off computes something else.
    """
    buffer = io.BytesIO()
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    arrays |= {f"output.{name}": array for name, array in outputs.items()}
    arrays |= {
        f"tolerance.{file}.{name}": np.array(value, np.float32)
        for file, tolerance in tolerances.items()
        for name, value in tolerance.items()
    }
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def write_entry(repository: Path, entry: Entry) -> Path:
    """Write a version and its entry's shared files.

    The whole entry is built in a hidden folder of the repository, which servers skip, with the other versions
    and the user's own files hard-linked from the entry that is there; everything is synced, and then the two
    folders change places in one step. Whenever the exporter is killed, a reader finds the entry as it was
    before or as it is after, never a mixture, and never none where there was one. What a killed exporter
    leaves in hidden folders the next one removes.

    Returns:
        The version folder.

    Raises:
        ExportError: the entry exists and can't be replaced in one step, or isn't a folder.
        OSError: the disk refused.
    """
    repository.mkdir(parents=True, exist_ok=True)
    target = (repository / entry.name).resolve()  # where an entry is a symbolic link, the folder it means
    if target.exists() and not target.is_dir():
        raise ExportError(f"{repository / entry.name}: is a file, not an entry; remove it or give --name")
    with _lock(repository):
        for stale in target.parent.glob(f".{entry.name}.export-*"):
            shutil.rmtree(stale)
        new = Path(tempfile.mkdtemp(prefix=f".{entry.name}.export-", dir=target.parent))
        try:
            new.chmod(0o755)  # mkdtemp's 0700 would hide the entry from a server with its own user
            if target.exists():
                _link_the_rest(target, new, entry)
            _write_files(new, entry)
            _publish(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return repository / entry.name / str(entry.version)


def _link_the_rest(old: Path, new: Path, entry: Entry) -> None:
    """Take over what this export doesn't write: other versions, and files that are none of the exporter's."""
    replaced = {str(entry.version), *entry.entry_files, *_written_before(old)}
    try:
        shutil.copytree(
            old,
            new,
            symlinks=True,
            ignore=lambda folder, names: replaced.intersection(names) if Path(folder) == old else (),
            copy_function=_link,
            dirs_exist_ok=True,
        )
    except shutil.Error as error:
        path, _, reason = error.args[0][0]
        raise ExportError(
            f"{path}: can't be taken over into the new {entry.name!r} ({reason}); move it out of the entry"
        ) from error


def _written_before(old: Path) -> set[str]:
    """Shared files as an earlier export left them: a network without labels needs no labels.txt of another.

    One that was changed since is the user's.
    """
    found: set[str] = set()
    for path in old.glob("*/report.json"):
        try:
            digests = json.loads(path.read_bytes())["sha256"].items()
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            continue  # a report of something else
        for name, digest in digests:
            if "/" not in name and (old / name).is_file() and _sha256((old / name).read_bytes()) == digest:
                found.add(name)
    return found


def _link(source: str, destination: str) -> None:
    """One more name for the same file; a copy where the file system has no hard links or refuses this one."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination)
        _sync(Path(destination))


def _write_files(folder: Path, entry: Entry) -> None:
    version = str(entry.version)
    contents = dict(entry.entry_files)
    contents |= {f"{version}/{name}": content for name, content in entry.version_files.items()}
    digests = {path: _sha256(content) for path, content in contents.items()}
    report = json.dumps({**entry.report, "sha256": digests}, indent=2, allow_nan=False) + "\n"
    contents[f"{version}/report.json"] = report.encode()
    (folder / version).mkdir()
    for path, content in contents.items():
        with (folder / path).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    for inner, _, _ in os.walk(folder):
        _sync(Path(inner))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _publish(new: Path, entry: Path) -> None:
    if entry.exists():
        _exchange(new, entry)
    else:
        new.rename(entry)
    _sync(entry.parent)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step: Linux's renameat2(2), flag RENAME_EXCHANGE.

    With two renames there would be a moment without the entry, in which a polling server unloads it.

    Raises:
        ExportError: the file system can't (NFS, for one), or the second is mounted by itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code not in {errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EBUSY}:
            raise OSError(code, os.strerror(code), str(second))
        raise ExportError(
            f"{second}: this entry exists and the file system can't replace a folder in one step "
            f"({os.strerror(code)}); export under another --name, to a repository on a local disk, or "
            "remove this entry first"
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
