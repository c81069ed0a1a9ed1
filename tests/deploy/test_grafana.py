"""The dashboard: every metric and label that it asks for is one that a server, asked once, really shows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.graphs import addition, write_model
from tests.serve.generate.decoders import CONTEXT, DATA, THIRD_PARTY
from tests.serve.generate.generation_client import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/onnxedge.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
# What PromQL itself and Prometheus bring.
LANGUAGE = {"sum", "avg", "max", "count", "by", "on", "and", "rate", "increase", "histogram_quantile"}
SCRAPED_LABELS = {"job"}


def metric_names(expression: str) -> set[str]:
    """The names outside of braces, brackets and lists of labels."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|on) *\([^)]*\)|\"[^\"]*\"", " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - LANGUAGE


def label_names(expression: str) -> set[str]:
    listed = ",".join(re.findall(r"\b(?:by|on) *\(([^)]*)\)", expression))
    matched = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression)
    return {*re.findall(r"\w+", listed), *matched} - SCRAPED_LABELS


def test_names_are_told_from_the_rest_of_promql() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{model=~"$model"}[$__rate_interval]))) > 0'
    )
    assert metric_names(expression) == {"a_bucket"}
    assert label_names(expression) == {"le", "model"}


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]) -> str:
    """The metrics of a server with a model that batches and one that generates, each asked once."""
    root = tmp_path_factory.mktemp("dashboard_models")
    write_model(root / "batched", addition())
    (root / "batched" / "config.pbtxt").write_text("max_batch_size: 4 dynamic_batching {}")
    write_decoder(root)
    server = serve("--model-repository", root)
    request = pb.ModelInferRequest(model_name="batched")
    for name in ("a", "b"):
        request.inputs.add(name=name, datatype="FP32", shape=[1, 3])
        request.raw_input_contents.append(np.ones((1, 3), np.float32).tobytes())
    with grpc.insecure_channel(server.url) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        stub.ModelInfer(request, timeout=30)
        list(stub.ModelStreamInfer(iter([ask("writer", input_ids=[1, 2, 3], max_tokens=4)]), timeout=30))
    text = server.metrics()
    server.stop()
    return text


def write_decoder(root: Path) -> None:
    decoder = THIRD_PARTY["optimum"]
    (root / "writer" / "1").mkdir(parents=True)
    shutil.copy(DATA / decoder.file, root / "writer" / "1" / "model.onnx")
    config = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in {**decoder.parameters, "context_length": str(CONTEXT)}.items()
    )
    (root / "writer" / "config.pbtxt").write_text(f"model_transaction_policy {{ decoupled: true }}\n{config}")


def test_every_metric_is_there(exposed: str) -> None:
    there = set(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", exposed, re.MULTILINE))
    asked = {name for expression in EXPRESSIONS for name in metric_names(expression)}
    assert len(asked) > 20
    assert asked - there == set()


def test_every_label_is_there(exposed: str) -> None:
    for expression in EXPRESSIONS:
        wanted = label_names(expression)
        for name in metric_names(expression):
            lines = re.findall(rf"^{name}(?:{{(.*)}})? ", exposed, re.MULTILINE)
            labels = {label for line in lines for label in re.findall(r"(\w+)=\"", line)}
            assert wanted - labels == set() or not labels, (name, expression)


def test_it_shows_all_that_was_asked_of_it() -> None:
    text = " ".join(EXPRESSIONS)
    for name in (
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "onnxedge_request_duration_seconds_bucket",
        "onnxedge_queue_depth",
        "onnxedge_batch_size_bucket",
        "process_resident_memory_bytes",
        "onnxedge_model_memory_bytes",
        "onnxedge_model_provider_info",
        "onnxedge_generation_tokens_total",
        "onnxedge_time_to_first_token_seconds_bucket",
    ):
        assert name in text


def test_every_panel_says_what_it_shows_and_follows_the_chosen_data_source() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
