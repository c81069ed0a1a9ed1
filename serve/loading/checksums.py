"""`report.json` beside a graph: what its exporter says of the files, held against the files themselves."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from serve.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

REPORT = "report.json"
GOLDEN = "golden.npz"

_MAX_REPORT_BYTES = 16 << 20
_DIGEST_DIGITS = 64
_SHOWN_DIGITS = 12


def read_report(version_folder: Path) -> Mapping[str, Any] | None:
    """The version's report; None where there is none.

    Raises:
        ModelLoadError: it is no JSON object, or over 16 MiB.
    """
    path = version_folder / REPORT
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            raise ModelLoadError(f"{REPORT} has over {_MAX_REPORT_BYTES} bytes: export the model again")
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{REPORT} can't be read ({error}): export the model again") from error
    if not isinstance(report, dict):
        raise ModelLoadError(f"{REPORT} is no JSON object: export the model again")
    return report


def verify(version_folder: Path, filename: str, others: Sequence[str] = ()) -> None:
    """Hold the files that are about to be used against the digests of the version's report.

    These are the graph, its side files and the golden samples; no other file is read. What the report has no
    digest of is not held against anything; nor is a version without a report.

    Args:
        version_folder: NAME/N.
        filename: the graph's.
        others: files that the graph keeps tensors in, see `serve.loading.graph_file.external_data`.

    Raises:
        ModelLoadError: a file is another than the report says, or the report is malformed.
    """
    report = read_report(version_folder)
    if report is None or "sha256" not in report:
        return
    digests = _digests(report["sha256"])
    for name in (filename, GOLDEN, *others):
        if name in digests and (name == filename or (version_folder / name).is_file()):
            _verify(version_folder / name, digests[name])


def _digests(stated: Any) -> Mapping[str, str]:
    """The version's part of the report's table, from paths below its folder to digests.

    A report speaks of one version, by the number that it was exported as, whatever its folder is named now.
    """
    if not isinstance(stated, dict) or not all(
        isinstance(digest, str) and len(digest) == _DIGEST_DIGITS for digest in stated.values()
    ):
        raise ModelLoadError(
            f"{REPORT}: sha256 is expected to have a digest of {_DIGEST_DIGITS} hexadecimal digits for each "
            "file: export the model again"
        )
    return {path.partition("/")[2]: digest for path, digest in stated.items() if "/" in path}


def _verify(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{path.name} can't be read: {error.strerror}") from error
    if found != expected.lower():
        raise ModelLoadError(
            f"{path.name} is not the file that was exported: its sha256 is {found[:_SHOWN_DIGITS]}..., "
            f"{REPORT} has {expected[:_SHOWN_DIGITS]}...; copy or export the model again, or remove {REPORT} "
            "where the file was changed on purpose"
        )
