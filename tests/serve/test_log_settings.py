"""The log: Triton's line formats, levels that change while the server runs, and what clients can't do."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve.errors import InvalidArgumentError
from serve.observability.log_settings import LogSettings, _Formatter
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

CLIENT = Path(__file__).with_name("interop_diagnostics.py")
DEFAULT = re.compile(r'([IWE])(\d{4}) \d\d:\d\d:\d\d\.\d{6} (\d+) (\S+):(\d+)\] (".*")')
ISO8601 = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ([IWE]) (\d+) (\S+):(\d+)\] (".*")')
INITIAL = {
    "log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0,
    "log_format": "default",
}  # fmt: skip


def messages(path: Path) -> list[str]:
    found = [DEFAULT.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(found)
    return [json.loads(match[6]) for match in found if match]


def log(tmp_path: Path, **settings: Any) -> LogSettings:
    return LogSettings(ServerSettings(model_repository=(tmp_path,), **settings))


@pytest.mark.parametrize(
    ("form", "pattern"), [("default", DEFAULT), ("ISO8601", ISO8601)], ids=["default", "ISO8601"]
)
def test_a_line_is_tritons_and_one_line_whatever_the_message(
    tmp_path: Path, form: str, pattern: re.Pattern[str]
) -> None:
    formatter = _Formatter(log(tmp_path, log_format=form))
    levels = {logging.DEBUG: "I", logging.INFO: "I", logging.WARNING: "W", logging.CRITICAL: "E"}
    for level, letter in levels.items():
        message = 'model "x"\nE1231 forged\x1b[2J'
        made = logging.LogRecord("serve.x", level, "/somewhere/server.py", 7, "%s", (message,), None)
        found = pattern.fullmatch(formatter.format(made))
        assert found is not None
        assert found[1] == letter
        assert found.groups()[-4:-1] == (str(os.getpid()), "server.py", "7")
        assert json.loads(found.groups()[-1]) == message


def test_a_traceback_stays_in_its_line(tmp_path: Path) -> None:
    try:
        raise ValueError("inner")  # noqa: TRY301 - caught for its traceback
    except ValueError:
        made = logging.LogRecord("serve", logging.ERROR, "x.py", 1, "failed", (), sys.exc_info())
    found = DEFAULT.fullmatch(_Formatter(log(tmp_path)).format(made))
    assert found is not None
    assert json.loads(found[6]).endswith("ValueError: inner")


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    made = log(tmp_path)
    for changes in ({"log_info": False, "log_colour": 1}, {"log_info": 0}, {"log_verbose_level": True}):
        with pytest.raises(InvalidArgumentError):
            made.update(changes)
        assert made.describe() == INITIAL


@pytest.fixture(scope="module")
def talkative(serve: Callable[..., RunningServer], repository: Path) -> tuple[RunningServer, dict[str, Any]]:
    """A server that tritonclient has changed the log settings of, stopped; and what it saw."""
    server = serve("--model-repository", repository)
    done = subprocess.run(
        [sys.executable, CLIENT, server.url, "logs"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert server.stop() == 0
    return server, json.loads(done.stdout)


def test_tritonclient_reads_and_changes_settings(talkative: tuple[RunningServer, dict[str, Any]]) -> None:
    seen = talkative[1]
    assert seen["initial"] == INITIAL
    assert seen["verbose"] == INITIAL | {"log_verbose_level": 1, "log_format": "ISO8601"}
    silent = {"log_info": False, "log_warning": False, "log_error": False, "log_format": "ISO8601"}
    assert seen["silent"] == seen["after_refusals"] == INITIAL | silent


@pytest.mark.parametrize(
    ("case", "status", "text"),
    [
        ("file", "UNIMPLEMENTED", "log file location can not be updated through network protocol"),
        ("format", "INVALID_ARGUMENT", "invalid argument for log_format"),
        ("unknown", "INVALID_ARGUMENT", "unknown log setting 'log_colour'"),
        ("no_value", "INVALID_ARGUMENT", "'log_info' has no value"),
        ("mixed", "INVALID_ARGUMENT", "log_format"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    talkative: tuple[RunningServer, dict[str, Any]], case: str, status: str, text: str
) -> None:
    assert talkative[1][f"refused_{case}"][0] == f"StatusCode.{status}"
    assert text in talkative[1][f"refused_{case}"][1]


def test_changes_take_effect_at_once(talkative: tuple[RunningServer, dict[str, Any]]) -> None:
    lines = talkative[0].log
    serving = next(number for number, line in enumerate(lines) if "SERVING: gRPC at " in line)
    assert DEFAULT.fullmatch(lines[serving].rstrip("\n"))
    shown = [line for line in lines[serving:] if "no\\nsuch model" in line]
    assert len(shown) == 1
    assert ISO8601.fullmatch(shown[0].rstrip("\n"))
    assert "never shown" not in "".join(lines)
    stopping = next(line for line in lines if "stopping: " in line)
    assert DEFAULT.fullmatch(stopping.rstrip("\n")), "the log was switched on again at the end"


def test_the_log_can_go_to_a_file_that_is_rotated(
    serve: Callable[..., RunningServer], repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "server.log"
    with pytest.raises(AssertionError, match="before it served"):
        serve("--model-repository", repository, f"--log-file={tmp_path}/no/server.log")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(repository), str(path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(path.with_suffix(".1")) == ["before"]
    assert messages(path) == ["after", "a library's"]


# A process of its own: the log's handler is the process's.
SCRIPT = """
import logging, pathlib, sys
from serve.observability.log_settings import configure_logging
from serve.settings import ServerSettings
path = pathlib.Path(sys.argv[2])
configure_logging(ServerSettings(model_repository=(pathlib.Path(sys.argv[1]),), log_file=str(path)))
logging.getLogger("serve.x").info("before")
logging.getLogger("serve.x").debug("not shown")
path.rename(path.with_suffix(".1"))
logging.getLogger("serve.x").info("after")
logging.getLogger("some.library").warning("a library's")
logging.getLogger("some.library").info("not shown")
"""
