"""The repository entry is written whole or not at all, whenever the exporter dies."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from export.repository import Entry, write_entry

ROOT = Path(__file__).parents[2]

# Writes an entry again and again, each time in a fresh copy of the repository and in a process of its own.
# That kills itself before the first, second, ... system call that write_entry makes, until one gets through.
KILLED_EXPORTERS = """
import builtins, io, os, shutil, signal, sys
from itertools import count
from pathlib import Path
from export import repository
from export.repository import Entry, write_entry

before, states, name, version, mark = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
entry = Entry(
    name, int(version),
    {"config.pbtxt": mark.encode(), "labels.txt": mark.encode()},
    {"model.onnx": mark.encode(), "golden.npz": mark.encode()},
    {"mark": mark},
)

def deadly(function, calls, fatal):
    def call(*arguments, **options):
        if next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for fatal in count():
    state = states / f"{fatal:02}"
    shutil.copytree(before, state)
    child = os.fork()
    if not child:
        calls = count()
        for name in ("mkdir", "chmod", "open", "sendfile", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name), calls, fatal))
        io.open = builtins.open = deadly(io.open, calls, fatal)
        repository._exchange = deadly(repository._exchange, calls, fatal)
        write_entry(state, entry)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def entry(version: int, mark: str) -> Entry:
    content = mark.encode()
    return Entry(
        "net",
        version,
        entry_files={"config.pbtxt": content, "labels.txt": content},
        version_files={"model.onnx": content, "golden.npz": content},
        report={"mark": mark},
    )


def visible(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.iterdir() if not path.name.startswith("."))


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


@pytest.mark.parametrize(
    ("present", "written", "before", "after"),
    [
        ([], 1, {1: None}, {1: "new"}),
        ([1], 2, {1: "old", 2: None}, {1: "old", 2: "new"}),
        ([1, 2], 2, {1: "old", 2: "old"}, {1: "old", 2: "new"}),
    ],
    ids=["new entry", "new version", "version replaced"],
)
def test_a_killed_exporter_leaves_the_old_or_the_new(
    present: list[int],
    written: int,
    before: dict[int, str | None],
    after: dict[int, str | None],
    tmp_path: Path,
) -> None:
    start, states = tmp_path / "start", tmp_path / "states"
    start.mkdir()
    for version in present:
        write_entry(start, entry(version, "old"))
    command = [sys.executable, "-c", KILLED_EXPORTERS, str(start), str(states), "net", str(written), "new"]
    subprocess.run(command, cwd=ROOT, check=True)

    found = [
        {version: mark_of(state / "net" / str(version)) for version in after}
        for state in sorted(states.iterdir())
    ]
    assert len(found) > 10  # as many deaths
    assert found == sorted(found, key=lambda marks: marks == after)  # once new, always new
    assert found[0] == before
    assert found[-1] == after
    assert all(marks in (before, after) for marks in found)
    for state in states.iterdir():
        for shared in (state / "net").glob("*.*"):
            assert shared.read_text() in {"old", "new"}
        write_entry(state, entry(written, "again"))
        assert visible(state) == [path.name for path in state.iterdir()] == ["net"]
        assert mark_of(state / "net" / str(written)) == "again"


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
