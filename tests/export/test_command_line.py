"""`python -m export`: what it writes, prints and answers to wrong usage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from export.__main__ import main
from export.session import Session
from serve.pb import model_config_pb2
from train.data.images import load_image_data

if TYPE_CHECKING:
    from tests.export.conftest import Exported


def report(exported: Exported) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((exported.version / "report.json").read_text())
    return content


def test_writes_an_entry_and_nothing_else(exported: Exported) -> None:
    files = {str(path.relative_to(exported.repository)) for path in exported.repository.rglob("*")}
    assert files == {
        "mobilenet", "mobilenet/config.pbtxt", "mobilenet/labels.txt", "mobilenet/1",
        "mobilenet/1/model.onnx", "mobilenet/1/model_int8.onnx", "mobilenet/1/golden.npz",
        "mobilenet/1/report.json", "mobilenet/1/report.md",
    }  # fmt: skip


def test_prints_steps_table_and_next_command_but_no_noise(exported: Exported) -> None:
    lines = exported.printed.splitlines()
    starts = [
        "rebuild the network", "translate mobilenet to ONNX", "verify fp32 on 3500 held-out rows",
        "calibrate int8 for x86-vnni with 512 rows (minmax)", "verify int8 on 3500 held-out rows",
        "measure latency and memory", "write ", "",
        "### mobilenet, for x86-vnni", "",
        "| graph | accuracy | size | batch 1 | batch 8 | memory |", "|---|", "| fp32", "| int8", "",
        "accuracy on 3500 held-out rows (PyTorch: ", "", "- int8: minmax calibration",
    ]  # fmt: skip
    # Which is faster, and what is said of it, depends on the machine.
    ends = ["", "wrote ", f"next: onnxedge serve --model-repository {exported.repository}"]
    assert all(line.startswith(end) for line, end in zip(lines[-3:], ends, strict=True)), exported.printed
    lines = [line for line in lines[:-3] if "gains nothing" not in line]
    assert len(lines) == len(starts), exported.printed
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), exported.printed


def test_config_describes_the_graph(exported: Exported) -> None:
    config = model_config_pb2.ModelConfig()
    text_format.Parse((exported.entry / "config.pbtxt").read_text(), config)
    graph = onnx.load(exported.version / config.default_model_filename).graph
    assert {field.name for field, _ in config.ListFields()} == {
        "name", "backend", "default_model_filename", "max_batch_size", "input", "output",
    }  # fmt: skip
    assert (config.name, config.backend, config.max_batch_size) == ("mobilenet", "onnxruntime", 8)
    described: list[Any] = [*config.input, *config.output]
    for tensor, value in zip(described, (*graph.input, *graph.output), strict=True):
        axes = value.type.tensor_type.shape.dim
        assert tensor.name == value.name
        assert axes[0].dim_param == "batch"
        assert list(tensor.dims) == [axis.dim_value or -1 for axis in axes[1:]]
    assert list(config.input[0].dims) == [-1, -1, 1]
    assert config.input[0].data_type == model_config_pb2.TYPE_UINT8
    assert config.output[0].data_type == model_config_pb2.TYPE_FP32
    assert config.output[0].label_filename == "labels.txt"


def test_another_version_without_the_default_graph_is_mentioned(
    exported: Exported, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(exported.repository, repository)
    flags = ("--to", str(repository), "--version", "2", "--precision", "q8", "--tolerance", "100")
    assert main([str(checkpoint), *flags]) == 0
    assert "note: version 1 has no model_q8.onnx" in capsys.readouterr().out
    config = model_config_pb2.ModelConfig()
    text_format.Parse((repository / "mobilenet" / "config.pbtxt").read_text(), config)
    assert config.default_model_filename == "model_q8.onnx"
    assert not (repository / "mobilenet" / "2" / "model.onnx").exists()
    assert (repository / "mobilenet" / "1" / "model.onnx").exists()


NETS = """
import torch

def small():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).eval(), torch.rand(64, 3)

def large():
    return torch.nn.Linear(5, 2).eval(), torch.rand(64, 5)
"""


def export_net(tmp_path: Path, function: str, *flags: str) -> Path:
    """Export one of NETS as "net"; the entry."""
    (tmp_path / "net.py").write_text(NETS)
    shared = ("--to", str(tmp_path / "models"), "--precision", "fp32", "--name", "net")
    assert main([f"{tmp_path / 'net.py'}:{function}", *shared, *flags]) == 0
    return tmp_path / "models" / "net"


def test_what_a_user_put_into_the_config_stays(tmp_path: Path) -> None:
    entry = export_net(tmp_path, "small")
    config = entry / "config.pbtxt"
    config.write_text(config.read_text() + "version_policy { all {} }\n")
    assert export_net(tmp_path, "small", "--version", "2", "--max-batch-size", "4") == entry
    message = model_config_pb2.ModelConfig()
    text_format.Parse(config.read_text(), message)
    assert message.version_policy.HasField("all")
    assert message.max_batch_size == 4
    assert [tensor.name for tensor in message.input] == ["input"]


def test_a_config_that_is_none_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = export_net(tmp_path, "small")
    (entry / "config.pbtxt").write_text("name = 'net'")
    flags = ("--to", str(tmp_path / "models"), "--precision", "fp32", "--name", "net")
    assert main([f"{tmp_path / 'net.py'}:small", *flags]) == 1
    assert "config.pbtxt: not a ModelConfig" in capsys.readouterr().err
    assert (entry / "config.pbtxt").read_text() == "name = 'net'"


def test_what_no_longer_fits_other_versions_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("yes\nno\n")
    export_net(tmp_path, "small", "--labels", str(labels))
    capsys.readouterr()
    export_net(tmp_path, "large", "--version", "2")
    said = capsys.readouterr().out
    assert (
        "note: version 2 has other inputs or outputs than config.pbtxt described up to now: version 1" in said
    )
    assert "note: the entry had a labels.txt, this export has none" in said


def test_an_encoded_image_needs_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef make(): return torch.nn.Linear(3, 2).eval(), torch.rand(4, 3)\n"
    )
    flags = ("--to", str(tmp_path / "models"), "--encoded-image")
    assert main([f"{tmp_path / 'net.py'}:make", *flags]) == 1
    assert "--encoded-image: net has no image input" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def with_info(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint that says other things of itself."""
    shutil.copytree(checkpoint, folder)
    info = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(info | changes))
    return folder


def test_an_untrained_network_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = with_info(checkpoint, tmp_path / "untrained", epoch=0)
    assert main([str(untrained), "--to", str(tmp_path / "models")]) == 1
    assert "is untrained: it has no finished epoch" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_run_that_was_cut_short_is_said_to_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = with_info(checkpoint, tmp_path / "short", epoch=1, metrics={})
    main([str(short), "--to", str(tmp_path / "models"), "--tolerance", "0"])
    assert "note: training was cut short, after 1 of 2 epochs" in capsys.readouterr().out


def test_a_target_that_is_a_file_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([str(checkpoint), "--to", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr()
    assert (printed.out, "is a file; name a folder of models" in printed.err) == ("", True)


def test_labels_are_the_data_sets(exported: Exported) -> None:
    labels = (exported.entry / "labels.txt").read_text().splitlines()
    assert tuple(labels) == load_image_data("fashion_mnist", data_dir=None, sample=True).labels


def test_report_has_the_sha256_of_every_other_file(exported: Exported) -> None:
    files = {
        str(path.relative_to(exported.entry)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in exported.entry.rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    assert report(exported)["sha256"] == files


def test_report_says_where_the_graph_comes_from_and_what_it_is_worth(
    exported: Exported, checkpoint: Path
) -> None:
    content = report(exported)
    trained = json.loads((checkpoint / "checkpoint.json").read_text())
    assert content["checkpoint"]["metrics"] == trained["metrics"]
    assert content["checkpoint"]["dataset_sha256"] == trained["dataset_sha256"]
    assert content["versions"].keys() >= {"torch", "onnx", "onnxruntime", "python", "onnxedge"}
    torch = content["metric"]["torch"]
    assert torch == pytest.approx(trained["metrics"]["test_accuracy"])
    assert torch > 0.5
    fp32, int8 = (content["variants"][name] for name in ("fp32", "int8"))
    assert int8["tolerance"] == 0.015
    assert int8["score"] >= torch - int8["tolerance"]
    assert fp32["differences"]["logits"]["relative"] < 1e-4
    assert int8["rows_apart"] == {"logits": 0.0}
    for variant in (fp32, int8):
        assert variant["bytes"] == (exported.version / variant["file"]).stat().st_size
        assert variant["latency_ms"].keys() == {"1", "8"}
        assert variant["rows_independent"]
    assert int8["bytes_ratio"] < 0.5
    assert content["default"] in content["variants"]
    assert (exported.version / "report.md").read_text().strip() in exported.printed


def test_golden_samples_reproduce(exported: Exported) -> None:
    golden = np.load(exported.version / "golden.npz")
    graphs = ("model.onnx", "model_int8.onnx")
    tolerances = {f"tolerance.{graph}.logits" for graph in graphs}
    assert set(golden.files) == {"input.image", "output.logits"} | tolerances
    assert golden["input.image"].shape == (8, 28, 28, 1)
    for graph in graphs:
        found = Session((exported.version / graph).read_bytes()).run({"image": golden["input.image"]})
        off = np.abs(found["logits"] - golden["output.logits"]).max()
        # A graph is never exact: a difference of zero would mean that its own outputs were stored.
        assert 0 < off <= golden[f"tolerance.{graph}.logits"]
        assert golden[f"tolerance.{graph}.logits"] < np.abs(golden["output.logits"]).max()


def test_no_path_of_this_machine_is_in_the_graph(exported: Exported) -> None:
    for graph in exported.version.glob("*.onnx"):
        content = graph.read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in content
        assert b"site-packages" not in content


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--name", ".hidden"), "--name '.hidden'"),
        (("--name", "a/b"), "--name 'a/b'"),
        (("--version", "0"), "--version 0: expected at least 1"),
        (("--tolerance", "-1"), "--tolerance -1.0: expected points or per cent from 0 to 100"),
        (("--precision", "int4"), "--precision int4: expected one of fp32, int8, int8_dynamic, q8, q4, fp16"),
        (("--precision", "fp32,fp32"), "--precision fp32,fp32: expected each one once"),
        (("--fix", "batch"), "--fix batch: expected AXIS=SIZE"),
        (("--top-k", "-1"), "--top-k -1"),
        (("--max-batch-size", "0"), "--max-batch-size 0"),
        ((), "no such checkpoint"),
    ],
)
def test_a_wrong_setting_is_one_message(
    arguments: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([str(tmp_path / "nothing"), "--to", str(tmp_path / "models"), *arguments])
    printed = capsys.readouterr().err
    assert status == 1
    assert printed.startswith("error: ")
    assert expected in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["runs/mobilenet", "--to", "models", "--target", "riscv"])
    assert ended.value.code == 2
    assert "'riscv'" in capsys.readouterr().err
