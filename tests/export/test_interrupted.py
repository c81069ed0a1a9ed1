"""An export that is killed leaves the old entry or the new one, to the byte, and the next export works."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export import repository
from export.repository import Entry, write_entry

ROOT = Path(__file__).parents[2]

Tree = dict[str, str]


def tree(entry: Path) -> Tree | None:
    """Relative path of everything in an entry to what it is; None where there is no entry."""
    if not entry.exists():
        return None
    return {str(path.relative_to(entry)): _content(path) for path in sorted(entry.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


# Writes an entry again and again, each time in a fresh copy of the repository and in a process of its own.
# That kills itself at the first, second, ... event with which Python announces an operation on files, or at a
# fsync, which has none, until one gets through. (Audit events: open, os.mkdir, os.link, os.rename, shutil.*,
# ...; ctypes.dlsym comes just before the exchange.)
KILLED_WRITERS = """
import json, os, shutil, signal, sys
from itertools import count
from pathlib import Path
from export.repository import Entry, write_entry

before, states = Path(sys.argv[1]), Path(sys.argv[2])
name, version, shared, files = json.loads(sys.argv[3])
encoded = [{key: value.encode() for key, value in part.items()} for part in (shared, files)]
entry = Entry(name, version, *encoded, {"mark": "new"})
HARMLESS = ("object.", "import", "marshal.", "compile", "exec", "os.scandir", "os.listdir", "glob.")

def die_at(fatal):
    events = count()
    def event(what, arguments=()):
        if not what.startswith(HARMLESS) and next(events) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync = os.fsync
    os.fsync = lambda descriptor: (event("fsync"), fsync(descriptor))
    sys.addaudithook(event)

for fatal in count():
    state = states / f"{fatal:03}"
    shutil.copytree(before, state, symlinks=True)
    child = os.fork()
    if not child:
        die_at(fatal)
        write_entry(state, entry)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""

# Exports by the command line again and again, into a repository without the entry and into one with it. Each
# process is killed at the first, second, ... line that it prints, up to the one that says that it writes; the
# next one gets through. Forked after the imports, which take longer than the rest. Prints the lines.
KILLED_EXPORTS = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
from export.__main__ import main
import export.pipeline, export.run, export.source

def export(repository, fatal=None):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        os._exit(main(["net.py:make", "--to", str(repository), "--precision", "fp32"]))
    os.close(writer)
    with os.fdopen(reader) as printed:
        for number, line in enumerate(printed):
            if number == fatal:
                os.kill(child, signal.SIGKILL)
                break
    assert os.waitpid(child, 0)[1] == (0 if fatal is None else signal.SIGKILL), line
    return line

for before, states in (sys.argv[1:3], sys.argv[3:]):
    for fatal in count():
        state = Path(states) / f"{fatal:03}"
        shutil.copytree(before, state)
        print(line := export(state, fatal), end="")
        if line.startswith("write "):
            break
    last = Path(states) / "last"
    shutil.copytree(state, last)
    (last / ".net.export-left").mkdir()
    (last / ".net.export-left/config.pbtxt").write_text("half of it")
    export(last)
"""

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(64, 4)
"""


def entry(mark: str, version: int = 1, *, labels: bool = True) -> Entry:
    """What an export writes, so small that its content is told by its mark."""
    content = mark.encode()
    shared = {"config.pbtxt": b"# " + content} | ({"labels.txt": content} if labels else {})
    files = {"model.onnx": content, "model_int8.onnx": content, "golden.npz": content}
    return Entry("net", version, shared, files, {"mark": mark})


def run(script: str, *arguments: object, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_states(states: Path, old: Tree | None, new: Tree | None) -> list[Tree | None]:
    """Every state is the old entry until one is the new, and from then on that.

    Returns:
        The entries, in the order of the deaths.
    """
    found = [tree(state / "net") for state in sorted(states.iterdir())]
    assert [entry for entry in found if entry not in (old, new)] == []
    assert found == sorted(found, key=lambda entry: entry == new)  # once new, always new
    return found


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ((), entry("new")),
        ((entry("old"),), entry("new")),
        ((entry("old"),), entry("new", 2)),
        ((entry("older"), entry("old", 2)), entry("new", 2, labels=False)),
    ],
    ids=["new entry", "version replaced", "new version", "one of two replaced, labels gone"],
)
def test_killed_at_any_system_call(there: tuple[Entry, ...], written: Entry, tmp_path: Path) -> None:
    before, states, after = tmp_path / "before", tmp_path / "states", tmp_path / "after"
    before.mkdir()
    for one in there:
        write_entry(before, one)
    if there:
        (before / "net/notes.txt").write_text("the user's")
        (before / "net/extra").mkdir()
        (before / "net/extra/link").symlink_to("../notes.txt")
    shutil.copytree(before, after, symlinks=True)
    write_entry(after, written)
    old, new = tree(before / "net"), tree(after / "net")
    assert old != new

    run(KILLED_WRITERS, before, states, as_json(written))
    found = check_states(states, old, new)
    assert len(found) > 30  # as many deaths, less one
    assert (found[0], found[-1]) == (old, new)
    assert found.count(new) > 3  # some die after it, as they sync and clean up
    leftovers = [state for state in states.iterdir() if [path.name for path in state.iterdir()] != ["net"]]
    assert len(leftovers) > 20
    for state in states.iterdir():
        write_entry(state, written)
        assert tree(state / "net") == new
        assert [path.name for path in state.iterdir()] == ["net"]


def as_json(written: Entry) -> str:
    shared, files = (
        {name: content.decode() for name, content in part.items()}
        for part in (written.entry_files, written.version_files)
    )
    return json.dumps([written.name, written.version, shared, files])


def test_killed_at_any_stage(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "nothing").mkdir()
    write_entry(tmp_path / "something", entry("old"))
    cases = {name: tmp_path / f"{name} killed" for name in ("nothing", "something")}
    folders = [folder for name, states in cases.items() for folder in (tmp_path / name, states)]
    printed = run(KILLED_EXPORTS, *folders, folder=tmp_path).splitlines()

    stages = [line.split()[0] for line in printed]
    stages, again = stages[: len(stages) // 2], stages[len(stages) // 2 :]
    assert stages == again
    assert (stages[0], stages[-1]) == ("call", "write")
    assert {"translate", "verify", "measure"} < set(stages)
    for name, states in cases.items():
        check_stages(tree(tmp_path / name / "net"), states, stages)
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "net.py", *cases, *(states.name for states in cases.values()),
    }  # fmt: skip


def check_stages(old: Tree | None, states: Path, stages: list[str]) -> None:
    *before, last, finished = sorted(states.iterdir())
    assert len(before) == len(stages) - 1
    assert [tree(state / "net") for state in before] == [old] * len(before)
    if tree(last / "net") != old:  # at the last line the writer races with its killer
        check_whole(last / "net")
    check_whole(finished / "net")
    assert [path.name for path in finished.iterdir()] == ["net"]


def check_whole(folder: Path) -> None:
    """The report's checksums are those of all the other files."""
    report = json.loads((folder / "1/report.json").read_text())
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    assert report["sha256"] == files


def test_everything_is_on_the_disk_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entry(tmp_path, entry("old"))
    synced: set[int] = set()
    published: list[set[str]] = []
    fsync, exchange = os.fsync, repository._exchange

    def record(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(new: Path, old: Path) -> None:
        paths = [new, *new.rglob("*")]
        published.append({path.name for path in paths if path.stat().st_ino not in synced})
        synced.clear()
        exchange(new, old)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(repository, "_exchange", check)
    write_entry(tmp_path, entry("new", 2))
    # Those of version 1 are the old files, by another name.
    assert published == [{"model.onnx", "model_int8.onnx", "golden.npz", "report.json"}]
    assert synced == {tmp_path.stat().st_ino}
