"""The manifests: valid by Kubernetes' own schemas, and true of the server that they start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve import __version__
from serve.flags import parse_server_settings
from tests.graphs import scaled, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serve.settings import ServerSettings
    from tests.conftest import RunningServer

yaml: Any = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
NOT_MANIFESTS = ("kustomization.yaml", "prometheus_adapter_values.yaml", "secure/deployment.yaml")
BY_HAND = ("copy_pod.yaml",)  # of no kustomization
# Kinds that Kubernetes itself has no schema for: see the tests below.
CUSTOM = ("serving.kserve.io/", "monitoring.coreos.com/")
# The first in which all of it is there, and the newest that the validator knows.
VERSIONS = ("1.30", "1.37")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


MANIFESTS = {
    f"{path.relative_to(KUBERNETES)}:{document['kind']}/{document['metadata']['name']}": document
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if not str(path).endswith(NOT_MANIFESTS)
    for document in documents(path)
}


def manifest(kind: str, name: str = "onnxedge") -> dict[str, Any]:
    found = [m for m in MANIFESTS.values() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1
    return found[0]


DEPLOYMENT = manifest("Deployment")
POD = DEPLOYMENT["spec"]["template"]["spec"]
COPY_POD = manifest("Pod", "onnxedge-copy")["spec"]
RUNTIME = manifest("ServingRuntime")
SERVICE = manifest("InferenceService")
CONTAINERS = {"deployment": POD["containers"][0], "kserve": RUNTIME["spec"]["containers"][0]}
MODELS = {"deployment": "/models", "kserve": "/mnt/models"}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
container_of = pytest.mark.parametrize("where", CONTAINERS)


def settings(where: str) -> ServerSettings:
    command, *flags = CONTAINERS[where]["args"]
    assert command == "serve"  # the image's entry point is `onnxedge`
    read, warnings = parse_server_settings([f.replace(f"={MODELS[where]}", f"={ROOT}") for f in flags], {})
    assert warnings == []
    return read


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [n for n, m in MANIFESTS.items() if not m["apiVersion"].startswith(CUSTOM)])
def test_kubernetes_own_schemas_take_it(name: str, version: str) -> None:
    validator: Any = pytest.importorskip("kubernetes_validate")
    validator.validate(MANIFESTS[name], version, strict=True)


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("kserve/")])
def test_kserve_takes_it(name: str) -> None:
    jsonschema: Any = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).parent / "kserve_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(MANIFESTS[name], {**schema, "$ref": f"#/$defs/{MANIFESTS[name]['kind']}"})


@pytest.mark.parametrize("version", VERSIONS)
def test_kserves_container_is_one_of_kubernetes(version: str) -> None:
    validator: Any = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    validator.validate({**pod, "spec": {"containers": RUNTIME["spec"]["containers"]}}, version, strict=True)


def test_every_manifest_can_be_applied_by_a_kustomization() -> None:
    for path in KUBERNETES.rglob("kustomization.yaml"):
        [kustomization] = documents(path)
        files = {str(each) for each in path.parent.glob("*.yaml") if not str(each).endswith(NOT_MANIFESTS)}
        here = {Path(each).name for each in files} - set(BY_HAND)
        resources = kustomization.get("resources", [])
        assert here == {each for each in resources if each.endswith(".yaml")}
        assert all((path.parent / each).exists() for each in resources)


def test_versions_are_pinned_and_there_is_no_secret() -> None:
    images = [container["image"] for container in CONTAINERS.values()]
    assert images == [f"onnxedge:{__version__}"] * 2
    for folder in ("base", "kserve"):
        [kustomization] = documents(KUBERNETES / folder / "kustomization.yaml")
        assert kustomization["images"] == [{"name": "onnxedge", "newTag": __version__}]
    assert re.fullmatch(r"busybox:\d+\.\d+\.\d+", COPY_POD["containers"][0]["image"])
    text = "".join(path.read_text() for path in KUBERNETES.rglob("*.yaml"))
    assert not re.search(r":latest\b|kind: Secret|password|token:", text)
    # An image that sets its own variables would not be read from the files here.
    assert not any("env" in container or "envFrom" in container for container in CONTAINERS.values())


@container_of
def test_it_runs_without_rights(where: str) -> None:
    own = CONTAINERS[where]["securityContext"]
    allowed = {**(POD["securityContext"] if where == "deployment" else {}), **own}
    assert allowed["runAsNonRoot"]
    assert allowed["runAsUser"] > 0
    assert allowed["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    pod = POD if where == "deployment" else SERVICE["spec"]["predictor"]
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


@container_of
def test_other_services_set_none_of_the_servers_variables(where: str) -> None:
    """A Service `onnxedge-grpc` would otherwise set ONNXEDGE_GRPC_PORT to an URL."""
    pod = POD if where == "deployment" else SERVICE["spec"]["predictor"]
    assert pod["enableServiceLinks"] is False


@container_of
def test_ports_and_volumes_are_the_flags(where: str) -> None:
    read = settings(where)
    ports = {port["name"]: port["containerPort"] for port in CONTAINERS[where]["ports"]}
    if where == "deployment":
        assert ports == {"grpc": read.grpc_port, "metrics": read.metrics_port}
        annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(read.metrics_port)
        [mount] = [m for m in CONTAINERS[where]["volumeMounts"] if m["name"] == "models"]
        assert mount == {"name": "models", "mountPath": MODELS[where], "readOnly": True}
    else:
        assert ports == {"h2c": read.grpc_port}
        assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(read.metrics_port)
    assert f"--model-repository={MODELS[where]}" in CONTAINERS[where]["args"]
    assert {CONTAINERS[where][p]["grpc"]["port"] for p in PROBES if p in CONTAINERS[where]} == {
        read.grpc_port
    }


@container_of
def test_the_grace_period_holds_the_drain(where: str) -> None:
    pod = POD if where == "deployment" else SERVICE["spec"]["predictor"]
    before = CONTAINERS[where].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    ends_within = 5
    needed = before + settings(where).exit_timeout_secs + ends_within
    assert pod["terminationGracePeriodSeconds"] >= needed
    if where == "deployment":
        probe = CONTAINERS[where]["readinessProbe"]
        assert before >= probe["periodSeconds"] * probe["failureThreshold"]


def test_services_find_the_pods_and_their_ports() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    ports = {port["name"] for port in CONTAINERS["deployment"]["ports"]}
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels
    for name in ("onnxedge", "onnxedge-pods"):
        service = manifest("Service", name)
        assert service["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert manifest("Service", "onnxedge-pods")["spec"]["clusterIP"] == "None"
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels
    policy = manifest("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports


def test_prometheus_finds_each_pod_once() -> None:
    monitor = manifest("ServiceMonitor")["spec"]
    [endpoint] = monitor["endpoints"]
    services = [manifest("Service", name) for name in ("onnxedge", "onnxedge-pods")]
    seen = [
        port
        for service in services
        if monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        for port in service["spec"]["ports"]
        if port["name"] == endpoint["port"]
    ]
    assert len(seen) == 1


def test_kserve_is_told_the_same_in_both_files() -> None:
    model = SERVICE["spec"]["predictor"]["model"]
    runtime = RUNTIME["spec"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["protocolVersion"] in runtime["protocolVersions"]
    assert model["modelFormat"].items() <= runtime["supportedModelFormats"][0].items()
    assert (
        model["storageUri"]
        == f"pvc://{manifest('PersistentVolumeClaim', 'onnxedge-models')['metadata']['name']}/"
    )


def test_the_pod_that_copies_may_do_no_more_than_the_servers() -> None:
    assert COPY_POD["securityContext"].items() <= POD["securityContext"].items()
    assert COPY_POD["containers"][0]["securityContext"] == CONTAINERS["deployment"]["securityContext"]
    claims = [volume.get("persistentVolumeClaim") for pod in (COPY_POD, POD) for volume in pod["volumes"]]
    assert [claim for claim in claims if claim] == [{"claimName": "onnxedge-models"}] * 2


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that loads, and one with a model that doesn't."""
    good, bad = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("bad")
    for folder in (good, bad):
        write_model(folder / "scaled", scaled(2.0))
    (bad / "broken" / "1").mkdir(parents=True)
    (bad / "broken" / "1" / "model.onnx").write_bytes(b"not a graph")
    return {"good": good, "bad": bad}


def started(serve: Callable[..., RunningServer], where: str, models: Path) -> RunningServer:
    """The container's own command line on free ports and another folder."""
    flags = [
        f for f in CONTAINERS[where]["args"][1:] if not f.startswith(("--grpc-port=", "--metrics-port="))
    ]
    swapped = [f.replace(f"={MODELS[where]}", f"={models}") for f in flags]
    assert swapped != flags
    return serve(*swapped)


def answers(server: RunningServer, where: str) -> Iterator[tuple[str, bool]]:
    """What kubelet would see: it asks health for the probe's service."""
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in PROBES:
            if (probe := CONTAINERS[where].get(name)) is not None:
                request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
                status = stub.Check(request, timeout=probe["timeoutSeconds"]).status
                yield name, status == health_pb2.HealthCheckResponse.SERVING


@container_of
def test_each_probe_succeeds_on_the_real_server(
    serve: Callable[..., RunningServer], repositories: dict[str, Path], where: str
) -> None:
    server = started(serve, where, repositories["good"])
    seen = dict(answers(server, where))
    assert seen == dict.fromkeys(seen, True)
    assert seen.keys() >= {"livenessProbe", "readinessProbe"}
    assert server.stop() == 0


@container_of
def test_a_model_that_cannot_be_loaded_makes_the_pod_unready_and_restarts_nothing(
    serve: Callable[..., RunningServer], repositories: dict[str, Path], where: str
) -> None:
    server = started(serve, where, repositories["bad"])
    seen = dict(answers(server, where))
    assert seen == {name: name != "readinessProbe" for name in seen}
    assert server.stop() == 0


def test_the_autoscalers_metrics_are_the_servers(
    serve: Callable[..., RunningServer], repositories: dict[str, Path]
) -> None:
    server = started(serve, "deployment", repositories["good"])
    metrics = server.metrics()
    assert server.stop() == 0
    wanted = {
        metric["pods"]["metric"]["name"] for metric in manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    }
    [adapter] = documents(KUBERNETES / "autoscaling" / "prometheus_adapter_values.yaml")
    rules = adapter["rules"]["custom"]
    assert {rule["name"]["as"] for rule in rules} == wanted
    for rule in rules:
        assert rule["seriesQuery"].startswith(rule["name"]["as"] + "{")
        assert re.search(rf"^{rule['name']['as']}(\{{| )", metrics, re.MULTILINE)


def test_the_autoscaler_scales_the_deployment() -> None:
    spec = manifest("HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "onnxedge"}
    assert spec["minReplicas"] >= 2
    in_flight = spec["metrics"][0]["pods"]["target"]["averageValue"]
    assert int(in_flight) < settings("deployment").max_inflight_requests
