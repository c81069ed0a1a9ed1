"""The systemd unit: what systemd says of it, whether it fits the server, and that it comes up again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from serve.flags import ENVIRONMENT_PREFIX, parse_server_settings
from serve.settings import ServerSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "onnxedge.service"
PAGE = ROOT / "docs" / "deploy" / "raspberry-pi.md"
ANALYZE = shutil.which("systemd-analyze")
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
MOST_EXPOSED = 1.5  # of 10

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ANALYZE), *words], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A copy whose program is there: systemd looks whether it is."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/onnxedge/bin/onnxedge", "/bin/echo"))
    return path


@needs_systemd
def test_systemd_has_nothing_to_say(unit: Path) -> None:
    verified = analyze("verify", unit)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs_systemd
def test_the_service_is_little_exposed(unit: Path) -> None:
    told = analyze("security", "--offline=true", "--no-pager", unit)
    if "unrecognized option" in told.stderr:
        pytest.skip("this systemd-analyze is older than 250 and only looks at running services")
    found = re.search(r"Overall exposure level for onnxedge\.service: ([\d.]+)", told.stdout)
    assert found is not None, told.stdout + told.stderr
    print(found[0])
    assert float(found[1]) <= MOST_EXPOSED
    assert f"# {found[1]} of 10" in PAGE.read_text()


def test_systemd_waits_longer_than_the_server_drains() -> None:
    seconds = int(directives()["TimeoutStopSec"][0])
    assert seconds > ServerSettings(model_repository=(ROOT,)).exit_timeout_secs


def test_the_unit_serves_from_where_the_page_puts_things(tmp_path: Path) -> None:
    found, page = directives(), PAGE.read_text()
    program, command = found["ExecStart"][0].split()
    variable, _, repository = found["Environment"][0].partition("=")
    assert (command, found["DynamicUser"], found["NoNewPrivileges"]) == ("serve", ["yes"], ["yes"])
    assert f"python3 -m venv {Path(program).parents[1]}" in page
    assert f"cp -r models {Path(repository).parent}/" in page
    assert f"cp onnxedge.env {Path(found['EnvironmentFile'][0].removeprefix('-')).parent}/" in page
    assert parse_server_settings([], {variable: str(tmp_path)})[0].model_repository == (tmp_path,)


def test_the_environment_file_names_flags(tmp_path: Path) -> None:
    lines = re.findall(r"^# (ONNXEDGE_\w+)=(.+)$", (FOLDER / "onnxedge.env").read_text(), re.MULTILINE)
    variables = {**dict(lines), "ONNXEDGE_MODEL_REPOSITORY": str(tmp_path)}
    flags = {f"{ENVIRONMENT_PREFIX}{setting.name.upper()}" for setting in fields(ServerSettings)}
    assert set(variables) == {name for name, _ in lines} <= flags
    assert parse_server_settings([], variables)[0].metrics_address == "127.0.0.1"


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["systemd/try_on_debian.sh", *(f"arm64/{name}.sh" for name in (
    "make_root", "in_root", "try_under_emulation"))])  # fmt: skip
def test_the_scripts_are_clean(script: str) -> None:
    done = subprocess.run(
        [str(SHELLCHECK), ROOT / "deploy" / script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(
    os.environ.get("ONNXEDGE_DEPLOY_TESTS") != "1",
    reason="ONNXEDGE_DEPLOY_TESTS is not 1: it needs root, mmdebstrap and systemd-container",
)
@pytest.mark.skipif(not (ROOT / "models" / "mobilenet").is_dir(), reason="models/ is not there: make models")
@pytest.mark.timeout(960)
def test_a_fresh_debian_serves_and_comes_up_again() -> None:
    done = subprocess.run(
        [FOLDER / "try_on_debian.sh"], capture_output=True, text=True, check=False, timeout=940
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
