"""What an export leaves of the entry that was there, and what others see meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from export import repository
from export.errors import ExportError
from export.repository import Entry, write_entry


def entry(version: int, mark: str) -> Entry:
    content = mark.encode()
    return Entry(
        "net",
        version,
        entry_files={"config.pbtxt": content, "labels.txt": content},
        version_files={"model.onnx": content, "golden.npz": content},
        report={"mark": mark},
    )


def mark_of(version: Path) -> str | None:
    """What a whole version was marked with; None where there is none. Fails on half of one."""
    if not version.exists():
        return None
    assert {path.name for path in version.iterdir()} == {"model.onnx", "golden.npz", "report.json"}
    report = json.loads((version / "report.json").read_text())
    for name in ("model.onnx", "golden.npz"):
        content = (version / name).read_bytes()
        assert report["sha256"][f"{version.name}/{name}"] == hashlib.sha256(content).hexdigest()
        assert content.decode() == report["mark"]
    mark: str = report["mark"]
    return mark


def test_a_polling_reader_never_misses_a_version_that_is_replaced(tmp_path: Path) -> None:
    version = write_entry(tmp_path, entry(1, "first"))
    done = threading.Event()

    def replace_often() -> None:
        for number in range(50):
            write_entry(tmp_path, entry(1, str(number)))
        done.set()

    writer = threading.Thread(target=replace_often)
    writer.start()
    polls = missing = 0
    while not done.is_set():
        polls += 1
        missing += not version.exists()
    writer.join()
    assert polls > 50
    assert missing == 0
    assert mark_of(version) == "49"


def test_two_exporters_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    writers = [
        threading.Thread(target=write_entry, args=(tmp_path, entry(version, f"v{version}")))
        for version in range(1, 9)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {version: mark_of(tmp_path / "net" / str(version)) for version in range(1, 9)} == {
        version: f"v{version}" for version in range(1, 9)
    }
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_server_of_another_user_can_read_the_entry(tmp_path: Path) -> None:
    write_entry(tmp_path, entry(1, "new"))
    for path in (tmp_path / "net").rglob("*"):
        assert path.stat().st_mode & 0o004, path
    assert (tmp_path / "net").stat().st_mode & 0o005 == 0o005


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path to content; None for a folder. Links are left out."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def test_another_version_is_the_same_files_under_the_new_config(tmp_path: Path) -> None:
    write_entry(tmp_path, entry(1, "old"))
    before = {path.name: path.stat() for path in (tmp_path / "net/1").iterdir()}
    folder_time = (tmp_path / "net/1").stat().st_mtime_ns
    write_entry(tmp_path, entry(2, "new"))
    assert {path.name: path.stat().st_ino for path in (tmp_path / "net/1").iterdir()} == {
        name: stat.st_ino for name, stat in before.items()
    }
    # A server that polls tells by the times whether to load a version again.
    assert (tmp_path / "net/1").stat().st_mtime_ns == folder_time
    assert (mark_of(tmp_path / "net/1"), mark_of(tmp_path / "net/2")) == ("old", "new")
    assert (tmp_path / "net/config.pbtxt").read_text() == "new"
    assert all(stat.st_nlink == 1 for stat in map(Path.stat, (tmp_path / "net/1").iterdir()))


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    net = tmp_path / "net"
    write_entry(tmp_path, entry(1, "old"))
    (net / "README.md").write_text("mine")
    (net / "notes/deep").mkdir(parents=True)
    (net / "notes/deep/a").write_text("mine")
    (net / "link").symlink_to("notes/deep/a")
    (net / "lost").symlink_to("nowhere")
    net.chmod(0o750)
    kept = {path: content for path, content in tree(net).items() if path.startswith(("README", "notes"))}
    write_entry(tmp_path, entry(1, "new"))
    assert {path: content for path, content in tree(net).items() if path in kept} == kept
    assert ((net / "link").readlink(), (net / "lost").readlink()) == (Path("notes/deep/a"), Path("nowhere"))
    assert net.stat().st_mode & 0o777 == 0o750
    assert mark_of(net / "1") == "new"


def test_labels_of_an_earlier_export_go_unless_the_user_changed_them(tmp_path: Path) -> None:
    without = replace(entry(1, "new"), entry_files={"config.pbtxt": b"new"})
    write_entry(tmp_path, entry(1, "old"))
    write_entry(tmp_path, without)
    assert not (tmp_path / "net/labels.txt").exists()
    write_entry(tmp_path, entry(1, "old"))
    (tmp_path / "net/labels.txt").write_text("mine")
    write_entry(tmp_path, without)
    assert (tmp_path / "net/labels.txt").read_text() == "mine"


def test_a_report_that_is_not_ours_is_no_obstacle(tmp_path: Path) -> None:
    for number, report in enumerate(
        (b"not JSON", b"[1]", b'{"sha256": 3}', b'{"sha256": {"a": []}}', b"\xff"), 2
    ):
        (tmp_path / "net" / str(number)).mkdir(parents=True)
        (tmp_path / "net" / str(number) / "report.json").write_bytes(report)
    assert mark_of(write_entry(tmp_path, entry(1, "new"))) == "new"
    assert (tmp_path / "net/2/report.json").read_bytes() == b"not JSON"


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    write_entry(tmp_path, entry(1, "old"))
    monkeypatch.setattr(os, "link", refuse)
    write_entry(tmp_path, entry(2, "new"))
    assert (mark_of(tmp_path / "net/1"), mark_of(tmp_path / "net/2")) == ("old", "new")


def test_an_entry_that_is_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/net").symlink_to("../elsewhere/net")
    write_entry(tmp_path / "elsewhere", entry(1, "old"))
    write_entry(tmp_path / "models", entry(1, "new"))
    assert (tmp_path / "models/net").is_symlink()
    assert mark_of(tmp_path / "elsewhere/net/1") == "new"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["net"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net").write_text("mine")
    with pytest.raises(ExportError, match="net: is a file, not an entry"):
        write_entry(tmp_path, entry(1, "new"))
    assert tree(tmp_path) == {"net": b"mine"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux only")
def test_a_file_system_that_cannot_swap_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "RENAME_EXCHANGE"
    write_entry(tmp_path, entry(1, "old"))
    before = tree(tmp_path)
    # No file system knows this flag: the kernel answers EINVAL, as NFS does for the real one.
    monkeypatch.setattr(repository, flags, 1 << 20)
    with pytest.raises(
        ExportError, match=r"net: this entry exists .* \(Invalid argument\); export under another"
    ):
        write_entry(tmp_path, entry(1, "new"))
    assert tree(tmp_path) == before
    write_entry(tmp_path, replace(entry(1, "new"), name="other"))
    assert mark_of(tmp_path / "other/1") == "new"
