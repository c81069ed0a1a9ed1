"""The component with TLS and tokens: what it makes of the base, and its probes on a real server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve.flags import ENVIRONMENT_PREFIX, parse_server_settings
from serve.settings import flag_of
from tests.graphs import scaled, write_model
from tests.serve.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

yaml: Any = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
PATCH = yaml.safe_load((KUBERNETES / "secure" / "deployment.yaml").read_text())
POD = PATCH["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
VARIABLES: dict[str, str] = {each["name"]: each["value"] for each in CONTAINER["env"]}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
MOUNTS = ("/certificates", "/tokens")


def test_its_variables_are_flags_of_the_server() -> None:
    settings, warnings = parse_server_settings([f"--model-repository={ROOT}"], VARIABLES)
    assert warnings == []
    assert settings.grpc_use_ssl
    assert not settings.auth_health
    assert [mount["mountPath"] for mount in CONTAINER["volumeMounts"]] == list(MOUNTS)
    files = (settings.grpc_server_cert, settings.grpc_server_key, settings.auth_token_file)
    assert [Path(file).parent for file in files] == [Path(MOUNTS[index]) for index in (0, 0, 1)]


@pytest.mark.parametrize("below", ["base", "autoscaling"])
def test_kubernetes_takes_what_it_makes_of_the_base(below: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: it joins the manifests")
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    site = tmp_path / "site"
    site.mkdir()
    (site / "kustomization.yaml").write_text(
        f"resources: [../kubernetes/{below}]\ncomponents: [../kubernetes/secure]\n"
    )
    done = subprocess.run(
        ["kubectl", "kustomize", site],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [deployment] = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "Deployment"]
    validator: Any = pytest.importorskip("kubernetes_validate")
    validator.validate(deployment, "1.30", strict=True)
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    for name in PROBES:
        assert "grpc" not in container[name], "a probe has one handler"
        assert container[name]["exec"]["command"][:2] == ["onnxedge", "health"]
    ready = container["readinessProbe"]
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert ready["periodSeconds"] * ready["failureThreshold"] <= wait
    [timeout] = [f.split("=")[1] for f in container["args"] if f.startswith("--exit-timeout-secs=")]
    assert wait + int(timeout) + 5 <= deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """The component's variables, with the two Secrets in folders of this machine."""
    certificates, tokens = tmp_path / "certificates", tmp_path / "tokens"
    authority = Authority(certificates)
    pair = authority.issue("server", host="onnxedge")
    shutil.copy(pair.certificate, certificates / "tls.crt")
    shutil.copy(pair.key, certificates / "tls.key")
    shutil.copy(authority.root, certificates / "ca.crt")
    tokens.mkdir()
    (tokens / "tokens").write_text("alice-0123456789\n")
    places = {"/certificates": str(certificates), "/tokens": str(tokens)}
    swapped = dict(VARIABLES)
    for name, value in VARIABLES.items():
        for mount, folder in places.items():
            swapped[name] = swapped[name].replace(f"{mount}/", f"{folder}/")
        assert (swapped[name] == value) == ("/" not in value)
    return swapped


def test_its_probes_succeed_on_a_real_server(
    secrets: dict[str, str], serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    write_model(tmp_path / "models" / "scaled", scaled(2.0))
    variables = {name.removeprefix(ENVIRONMENT_PREFIX).lower(): value for name, value in secrets.items()}
    del variables["health_flags"]
    flags = [f"--{flag_of(name)}={value}" for name, value in variables.items()]
    server = serve("--model-repository", tmp_path / "models", *flags)
    environment = secrets | {"ONNXEDGE_GRPC_PORT": str(server.grpc_port), "PYTHONPATH": str(ROOT)}
    for name in PROBES:
        program, *words = CONTAINER[name]["exec"]["command"]
        assert program == "onnxedge"
        done = subprocess.run(
            [sys.executable, "-m", "serve", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "SERVING\n"), (name, done.stderr)
    assert server.stop() == 0
