"""The command line: flags, environment, and each command run for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from serve import __version__
from serve.flags import WITHOUT_EFFECT, parse_server_settings
from serve.runtime.cores import usable_cores
from serve.settings import ServerSettings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RunningServer

ROOT = Path(__file__).parents[2]


def onnxedge(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def parse(*arguments: str, **environment: str) -> ServerSettings:
    return parse_server_settings(arguments, environment)[0]


def test_flags_are_spelled_as_tritons(tmp_path: Path) -> None:
    settings = parse(
        f"--model-repository={tmp_path}", "--grpc-port", "9001", "--allow-metrics=0", "--id=edge"
    )
    assert settings == ServerSettings(
        model_repository=(tmp_path,), server_id="edge", grpc_port=9001, allow_metrics=False
    )


def test_flags_of_triton_that_change_nothing_here_are_named_in_a_warning(tmp_path: Path) -> None:
    line = ["--http-port=8000", "--allow-gpu-metrics", "false", "--pinned-memory-pool-byte-size=1"]
    settings, warnings = parse_server_settings([f"--model-repository={tmp_path}", *line], {})
    assert settings == ServerSettings(model_repository=(tmp_path,))
    assert [warning.split()[0] for warning in warnings] == [
        "--http-port",
        "--allow-gpu-metrics",
        "--pinned-memory-pool-byte-size",
    ]
    assert not {f"--{flag}" for flag in ("grpc-port", "load-model", "backend-config")} & WITHOUT_EFFECT.keys()


def test_model_repository_may_be_given_more_than_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    settings = parse(f"--model-repository={tmp_path}", f"--model-store={tmp_path / 'b'}")
    assert settings.model_repository == (tmp_path, tmp_path / "b")


def test_a_misspelt_variable_is_named(tmp_path: Path) -> None:
    environment = {
        "ONNXEDGE_MODEL_REPOSITORY": str(tmp_path),
        "ONNXEDGE_GRPC_PROT": "9",
        "ONNXEDGE_PORT_8001_TCP": "tcp://10.0.0.1:8001",
        "ONNXEDGE_HEALTH_FLAGS": "--ssl",
        "GRPC_PORTS": "9",
    }
    assert parse_server_settings([], environment)[1] == [
        "ONNXEDGE_GRPC_PROT has no effect: did you mean ONNXEDGE_GRPC_PORT?"
    ]


def test_flags_win_over_the_environment(tmp_path: Path) -> None:
    environment = {
        "ONNXEDGE_MODEL_REPOSITORY": str(tmp_path),
        "ONNXEDGE_GRPC_PORT": "1",
        "ONNXEDGE_SERVER_ID": "a",
    }
    settings = parse("--grpc-port=2", **environment)
    assert (settings.grpc_port, settings.server_id, settings.model_repository) == (2, "a", (tmp_path,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model-repository is missing"),
        (["--model-repository=/nowhere"], "/nowhere is not a folder"),
        (["--model-repositry=/tmp"], "unknown flag --model-repositry: did you mean --model-repository"),
        (["--colour=red"], "unknown flag --colour: onnxedge serve --help lists"),
        (["--model-repository=.", "--load-model=a"], "--load-model needs --model-control-mode=explicit"),
        (["--model-repository=.", "--model-control-mode=pull"], "'pull', expected none or explicit or poll"),
        (["models"], "unexpected 'models': did you mean --model-repository models?"),
        (["--model-repository=.", "--grpc-port=99999"], "--grpc-port is 99999, expected 0 to 65535"),
        (["--model-repository=.", "--grpc-port=eight"], "--grpc-port: invalid int value: 'eight'"),
        (["--model-repository=.", "--allow-metrics=perhaps"], "expected true or false, got 'perhaps'"),
        (["--model-repository=.", "--max-inflight-requests=0"], "expected 1 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(*arguments)


def test_help_version_and_unknown_commands() -> None:
    assert "serve a model repository" in onnxedge("--help").stdout
    assert onnxedge("--version").stdout == f"onnxedge {__version__}\n"
    assert "--grpc-port" in onnxedge("serve", "--help").stdout
    unknown = onnxedge("server")
    assert (unknown.returncode, "unknown command 'server'" in unknown.stderr) == (2, True)


def test_a_taken_port_is_reported(server: RunningServer, repository: Path) -> None:
    flags = ("--model-repository", repository, f"--grpc-port={server.grpc_port}", "--grpc-address=127.0.0.1")
    ended = onnxedge("serve", *flags, "--metrics-port=0")
    assert ended.returncode == 1
    assert f"127.0.0.1:{server.grpc_port} (--grpc-port) can't be had: Address already" in ended.stderr
    taken = (f"--metrics-port={server.metrics_port}", "--metrics-address=127.0.0.1")
    ended = onnxedge("serve", "--model-repository", repository, "--grpc-port=0", *taken)
    assert f"127.0.0.1:{server.metrics_port} (--metrics-port) can't be had: Address already" in ended.stderr
    assert "successfully loaded" not in ended.stderr


def test_an_empty_repository_is_warned_of(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    running = serve("--model-repository", tmp_path)
    assert f"no model in {tmp_path}" in "".join(running.log)
    assert running.stop() == 0


def test_flags_without_a_command_are_those_of_serve(repository: Path) -> None:
    ended = onnxedge("--model-repository", repository, "--grpc-port=-1")
    assert (ended.returncode, "onnxedge serve: --grpc-port is -1" in ended.stderr) == (2, True)


def test_providers_lists_what_works_and_what_does_not() -> None:
    listed = onnxedge("providers").stdout
    assert "CPUExecutionProvider         usable" in listed
    assert f"{usable_cores()} usable cores" in listed


def test_a_cgroup_quota_limits_the_cores(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def image_server(
    tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., RunningServer]
) -> RunningServer:
    """Models whose scores are the means of an image's channels: FP32 CHW and UINT8 HWC."""
    root = tmp_path_factory.mktemp("images")
    write_channel_means(root / "chw", ["n", 3, 4, 4], TensorProto.FLOAT, [2, 3])
    write_channel_means(root / "hwc", ["n", "h", "w", 3], TensorProto.UINT8, [1, 2])
    write_channel_means(root / "vector", ["n", 7, 7], TensorProto.FLOAT, [1])
    write_channel_means(root / "best", ["n", "h", "w", 3], TensorProto.UINT8, [1, 2], best=2)
    (root / "best" / "labels.txt").write_text("red\ngreen\nblue\n")
    (root / "best" / "config.pbtxt").write_text(
        'output { name: "logits" data_type: TYPE_FP32 dims: [ -1, 3 ] label_filename: "labels.txt" }'
    )
    return serve("--model-repository", root)


def write_channel_means(
    folder: Path, shape: list[int | str], onnx_type: int, axes: list[int], best: int = 0
) -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["scores"], axes=axes, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "means",
        [helper.make_tensor_value_info("image", onnx_type, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3 if len(shape) == 4 else 7])],
    )  # fmt: skip
    if best:
        graph.initializer.append(helper.make_tensor("k", TensorProto.INT64, [1], [best]))
        graph.node[1].output[0] = graph.output[0].name = "logits"
        graph.node.append(helper.make_node("TopK", ["logits", "k"], ["scores", "classes"]))
        graph.output.insert(0, helper.make_tensor_value_info("classes", TensorProto.INT64, ["n", best]))
        graph.output.insert(0, helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", best]))
    (folder / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "1" / "model.onnx")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.full((8, 6, 3), (51, 204, 102), np.uint8)).save(path)
    return path


def test_infer_prints_the_top_classes(image_server: RunningServer, picture: Path) -> None:
    done = onnxedge("infer", "hwc", "--image", picture, "--url", image_server.url, "--top", "2")
    assert done.stdout == "  204.0000  1\n  102.0000  2\n"


def test_infer_sorts_all_classes_and_names_them_where_the_model_keeps_its_logits(
    image_server: RunningServer, picture: Path
) -> None:
    done = onnxedge("infer", "best", "--image", picture, "--url", image_server.url, "--top", "3")
    assert done.stdout == "  204.0000  green\n  102.0000  blue\n   51.0000  red\n"


def test_infer_reads_sixteen_bits(image_server: RunningServer, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 6), 51 * 257, np.uint16)).save(tmp_path / "deep.png")
    done = onnxedge("infer", "hwc", "--image", tmp_path / "deep.png", "--url", image_server.url, "--top", "1")
    assert done.stdout == "   51.0000  0\n"


@pytest.mark.parametrize(("scaling", "first"), [("none", "204.0"), ("unit", "0.8"), ("inception", "0.6")])
def test_infer_scales_float_inputs_as_told(
    image_server: RunningServer, picture: Path, scaling: str, first: str
) -> None:
    flags = ("--url", image_server.url, "--scaling", scaling, "--top", "1")
    done = onnxedge("infer", "chw", "--image", picture, *flags)
    assert done.stdout == f"{float(first):10.4f}  1\n"


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("chw", [], "is FP32: name its --scaling"),
        ("vector", [], "expected [H, W, 1 or 3] or [1 or 3, H, W]"),
        ("nope", [], "NOT_FOUND: Request for unknown model: 'nope'"),
        ("hwc", ["--image", __file__], "is not an image"),
        ("hwc", ["--image", "/nowhere.png"], "No such file"),
        ("hwc", ["--scaling", "unit"], "is UINT8 and takes pixels as they are: leave --scaling out"),
        ("hwc", ["--top", "0"], "--top is 0, expected 1 or more"),
        ("hwc", ["--url", "127.0.0.1:1", "--timeout", "5"], "127.0.0.1:1: UNAVAILABLE"),
    ],
)
def test_infer_says_what_is_wrong(
    image_server: RunningServer, picture: Path, model: str, flags: list[str], message: str
) -> None:
    done = onnxedge("infer", model, "--image", picture, "--url", image_server.url, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trace-file=t.json", "write --trace-config=triton,file=FILE"),
        ("--model-repository=s3://bucket/models", "object stores are not supported"),
    ],
)
def test_flags_of_triton_that_are_written_otherwise_say_how(flag: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(flag)


def test_old_and_short_forms_of_tritons_flags(tmp_path: Path) -> None:
    repository = f"--model-repository={tmp_path}"
    assert parse(repository, "--strict-model-config=true").disable_auto_complete_config
    assert not parse(repository, "--strict-model-config=false").disable_auto_complete_config
    levels = {"--log-verbose": 1, "--log-verbose=true": 1, "--log-verbose=false": 0, "--log-verbose=2": 2}
    assert {flag: parse(repository, flag).log_verbose for flag in levels} == levels


def test_an_address_that_is_not_this_machines_is_named(repository: Path) -> None:
    ended = onnxedge("serve", "--model-repository", repository, "--grpc-address=203.0.113.1", "--grpc-port=0")
    assert ended.returncode == 1
    assert "203.0.113.1:0 (--grpc-address) can't be had" in ended.stderr
