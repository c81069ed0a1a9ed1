"""Model folders on disk: which there are, their versions, and stamps that tell when their files change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_MAX_NAME_BYTES = 255  # of a file name on every file system at hand
_MAX_VERSION_DIGITS = 18  # of an int64
_MAX_FILES = 10_000  # of one model; a folder with more is no model but somebody's disk
_MAX_DEPTH = 8

File = tuple[str, int, int, int]
"""Path below the model's folder, time of the last change in ns, size in bytes, inode."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a model's folder holds, without reading it: equal stamps mean that nothing changed.

    Attributes:
        shared: the files outside version folders: config.pbtxt, labels, warm-up and initial-state files.
        versions: each version's files.
    """

    shared: frozenset[File]
    versions: Mapping[int, frozenset[File]]


def is_file_name(name: str) -> bool:
    """Whether a text from outside names something in a folder, and can't name anything elsewhere.

    Names with a leading dot are hidden: an exporter's unfinished writes, `.git`.
    """
    return (
        bool(name)
        and not name.startswith(".")
        and not set(name) & set("/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES
    )


def version_number(text: str) -> int | None:
    """The version that a folder of this name holds; None for others, 01 and 0 too, as in Triton."""
    is_number = text.isascii() and text.isdecimal() and not text.startswith("0")
    return int(text) if is_number and len(text) <= _MAX_VERSION_DIGITS else None


def check_repository(root: Path) -> None:
    """Refuse what is no model repository.

    Raises:
        ModelLoadError: it is no folder, or a model.
    """
    if not root.is_dir():
        raise ModelLoadError(f"model repository {root} is not a folder")
    if (root / "config.pbtxt").exists() or version_numbers(root):
        raise ModelLoadError(f"{root} is a model, not a model repository: give its parent, {root.parent}")


def model_names(root: Path) -> set[str]:
    """The folders of a repository that are models.

    Raises:
        OSError: the folder can't be read.
    """
    return {child.name for child in root.iterdir() if is_file_name(child.name) and child.is_dir()}


def model_folders(roots: Sequence[Path], name: str) -> list[Path]:
    """The folders of this name in the repositories; a name that is a path in disguise has none."""
    return [root / name for root in roots if (root / name).is_dir()] if is_file_name(name) else []


def version_numbers(folder: Path) -> list[int]:
    """The versions that a model's folder holds."""
    return [number for child in folder.iterdir() if (number := version_number(child.name)) and child.is_dir()]


def stamp(folder: Path) -> Stamp:
    """Look at a model's files.

    Raises:
        OSError: the folder can't be read, or a file vanished meanwhile.
        ModelLoadError: it holds far too many files.
    """
    shared: set[File] = set()
    versions: dict[int, set[File]] = {number: set() for number in version_numbers(folder)}
    for count, file in enumerate(_files(str(folder), "", 0)):
        if count == _MAX_FILES:
            raise ModelLoadError(f"the folder holds more than {_MAX_FILES} files, expected a model")
        versions.get(version_number(file[0].split("/", 1)[0]) or 0, shared).add(file)
    return Stamp(frozenset(shared), {number: frozenset(files) for number, files in versions.items()})


def _files(folder: str, prefix: str, depth: int) -> Iterator[File]:
    with os.scandir(folder) as children:
        for child in children:
            path = f"{prefix}{child.name}"
            if child.name.startswith("."):
                continue
            # Folders behind links are looked into only where a version is one; a link into itself has no end.
            if child.is_dir(follow_symlinks=depth == 0):
                if depth < _MAX_DEPTH:
                    yield from _files(child.path, f"{path}/", depth + 1)
                continue
            status = child.stat()
            yield path, status.st_mtime_ns, status.st_size, status.st_ino
