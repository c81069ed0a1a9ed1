"""`python -m export inspect`: against known figures, and on graphs of every kind."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime import datasets

from export.errors import ExportError
from export.graph import export_graph, serialize
from export.inspection.inspect import inspect_graph, main
from tests import graphs
from train import mobilenet, resnet
from train.family import ExampleInputs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from tests.export.conftest import Exported

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def save(
    path: Path, nodes: Sequence[onnx.NodeProto], inputs: Sequence[Any], weights: dict[str, np.ndarray]
) -> Path:
    """A graph of some nodes; its outputs are the last node's, of any shape."""
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    outputs = [graphs.info(name, None) for name in nodes[-1].output if name]
    domains = {"": 20, **{node.domain: 1 for node in nodes if node.domain}}
    model = helper.make_model(
        helper.make_graph(nodes, "graph", inputs, outputs, stored),
        opset_imports=[helper.make_opsetid(name, version) for name, version in domains.items()],
        ir_version=9,
    )
    onnx.save(model, path)
    return path


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def translate(module: nn.Module, path: Path) -> Path:
    image = ExampleInputs({"image": torch.zeros(2, 3, 224, 224)}, {"image": {0: "batch"}}, ("logits",))
    path.write_bytes(serialize(export_graph(module.eval(), image)))
    return path


def test_work_of_resnet18_is_the_published(tmp_path: Path) -> None:
    # 1.8e9 multiply-adds: He et al., "Deep Residual Learning for Image Recognition" (2015), table 1.
    arguments = {"depth": "18", "classes": 1000, "channels": 3, "stem": "imagenet", "width": 1.0}
    network = resnet.build_model({**arguments, "zero_residual": False})
    found = inspect_graph(translate(network, tmp_path / "resnet.onnx"))
    assert found.work.multiply_adds == pytest.approx(1.82e9, rel=0.01)
    assert found.work.not_counted == {}
    # Scale and shift of its 4800 batch norm channels are folded into the convolutions; untrained, to no bias.
    assert found.parameters.count == sum(p.numel() for p in network.parameters()) - 9600
    assert found.parameters.bytes == pytest.approx(4 * found.parameters.count, abs=100)


def test_work_of_mobilenet_v2_is_the_published(tmp_path: Path) -> None:
    # 300e6 multiply-adds: Sandler et al., "MobileNetV2" (2018), table 4.
    arguments = {"classes": 1000, "channels": 3, "width": 1.0, "stem": "imagenet", "dropout": 0.0}
    found = inspect_graph(translate(mobilenet.build_model(arguments), tmp_path / "mobilenet.onnx"))
    assert found.work.multiply_adds == pytest.approx(300e6, rel=0.01)
    assert found.operators["Conv"] == 52


def test_int8_has_the_parameters_and_the_work_of_fp32(exported: Exported) -> None:
    before, after = (inspect_graph(exported.version / name) for name in ("model.onnx", "model_int8.onnx"))
    assert after.work.multiply_adds == before.work.multiply_adds
    assert after.parameters.count == pytest.approx(before.parameters.count, rel=0.01)
    assert (before.quantized_parameters, before.quantized_work) == (0, 0)
    assert after.quantized_parameters > 0.95
    assert after.quantized_work == 1


def test_convolution_that_answers_in_float_is_none_of_the_integers(
    exported: Exported, tmp_path: Path
) -> None:
    """As onnxruntime has it: it needs the quantization behind a convolution to take it into the integers."""
    model = onnx.load(exported.version / "model_int8.onnx")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.output.append(graphs.info(conv.output[0], None))
    quantize = next(node for node in model.graph.node if conv.output[0] in node.input)
    model.graph.node.remove(quantize)
    restore = next(node for node in model.graph.node if quantize.output[0] in node.input)
    for node in model.graph.node:
        node.input[:] = [conv.output[0] if name == restore.output[0] else name for name in node.input]
    model.graph.node.remove(restore)
    onnx.save(model, tmp_path / "changed.onnx")

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "changed.onnx"), options)
    run = inspect_graph(tmp_path / "optimized.onnx")
    found = inspect_graph(tmp_path / "changed.onnx")
    assert found.work.integer_multiply_adds == run.work.integer_multiply_adds < run.work.multiply_adds


def lstm(kind: str) -> tuple[list[onnx.NodeProto], list[Any], dict[str, np.ndarray]]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    node = helper.make_node(kind, ["x", "w", "r"], ["", "y"], hidden_size=8)
    return (
        [node],
        [graphs.info("x", [5, "batch", 7])],
        {"w": floats(1, gates * 8, 7), "r": floats(1, gates * 8, 8)},
    )


OPERATORS: dict[str, tuple[list[onnx.NodeProto], list[Any], dict[str, np.ndarray], int]] = {
    "Conv with groups": (
        [helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1])],
        [graphs.info("x", ["batch", 4, 6, 6])],
        {"w": floats(8, 2, 3, 3)},
        6 * 6 * 8 * 2 * 9,
    ),
    "ConvTranspose": (
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])],
        [graphs.info("x", ["batch", 4, 5, 5])],
        {"w": floats(4, 3, 2, 2)},
        5 * 5 * 4 * 3 * 4,
    ),
    "Gemm, transposed": (
        [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)],
        [graphs.info("x", [10, 4])],
        {"w": floats(6, 10)},
        4 * 10 * 6,
    ),
    "MatMul, broadcast": (
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [graphs.info("x", ["batch", 3, 5, 10])],
        {"w": floats(10, 7)},
        3 * 5 * 10 * 7,
    ),
    "Einsum": (
        [helper.make_node("Einsum", ["x", "w"], ["y"], equation="bij,jk->bik")],
        [graphs.info("x", ["batch", 5, 10])],
        {"w": floats(10, 7)},
        5 * 10 * 7,
    ),
    "LSTM": (*lstm("LSTM"), 5 * 4 * 8 * 15),
    "GRU": (*lstm("GRU"), 5 * 3 * 8 * 15),
    "RNN": (*lstm("RNN"), 5 * 8 * 15),
    "MatMulNBits": (
        [
            helper.make_node(
                "MatMulNBits", ["x", "w", "s"], ["y"],
                domain="com.microsoft", K=64, N=12, bits=4, block_size=32,
            )
        ],
        [graphs.info("x", ["batch", 3, 64])],
        {"w": np.ones((12, 2, 16), np.uint8), "s": floats(12, 2)},
        3 * 64 * 12,
    ),
    "MultiHeadAttention": (
        [
            helper.make_node(
                "MultiHeadAttention", ["x", "k", "k"], ["y"], domain="com.microsoft", num_heads=2
            )
        ],
        [graphs.info("x", ["batch", 3, 8])],
        {"k": floats(1, 5, 8)},
        2 * 3 * 5 * 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_work_of_an_operator(name: str, tmp_path: Path) -> None:
    nodes, inputs, weights, expected = OPERATORS[name]
    found = inspect_graph(save(tmp_path / "model.onnx", nodes, inputs, weights))
    assert found.work.multiply_adds == expected
    assert found.work.not_counted == {}
    assert not [note for note in found.notes if "inferred" in note]


def test_four_bit_blocks_are_counted_by_number(tmp_path: Path) -> None:
    nodes, inputs, weights, _ = OPERATORS["MatMulNBits"]
    found = inspect_graph(save(tmp_path / "model.onnx", nodes, inputs, weights))
    assert found.parameters.count_by_bits == {"4": 64 * 12}
    assert found.parameters.bytes_by_type == {"UINT8": 64 * 12 // 2, "FLOAT": 4 * 24}
    assert (found.quantized_parameters, found.quantized_work) == (1, 1)


def test_what_is_not_counted_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Einsum", ["x", "x", "x"], ["p"], equation="ij,ij,ij->ij"),
        helper.make_node("Mystery", ["p"], ["q"], domain="nobody.knows"),
        helper.make_node("MatMul", ["q", "q"], ["y"]),
    ]
    found = inspect_graph(save(tmp_path / "model.onnx", nodes, [graphs.info("x", ["batch", 4])], {}))
    assert found.work.multiply_adds == 0
    assert found.work.not_counted == {
        "Einsum (its work is unknown)": 1,
        "Mystery (its work is unknown)": 1,
        "MatMul (shape unknown)": 1,
    }
    assert "inferred" in found.notes[-1]
    assert found.operators["nobody.knows.Mystery"] == 1


def test_a_loop_counts_as_often_as_it_turns(tmp_path: Path) -> None:
    found = inspect_graph(graphs.write_model(tmp_path, graphs.slow()))
    assert found.work.multiply_adds == 128**3  # ones are fed, and `n` is one of them
    assert found.operators["MatMul"] == 1


def test_activations_are_freed_after_their_last_reader(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in ("xa", "ab", "bc", "cy")]
    chain = inspect_graph(save(tmp_path / "chain.onnx", nodes, [graphs.info("x", ["batch", 1000])], {}))
    assert chain.peak_activation_bytes == 3 * 4000  # the input stays, and two values besides
    nodes[-1] = helper.make_node("Sum", ["c", "a", "b"], ["y"])
    fan = inspect_graph(save(tmp_path / "fan.onnx", nodes, [graphs.info("x", ["batch", 1000])], {}))
    assert fan.peak_activation_bytes == 5 * 4000
    assert fan.memory_bytes == fan.peak_activation_bytes  # no weights


def test_symbolic_axes_are_set_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inputs = [graphs.info("x", ["batch", "time", None, 8])]
    path = save(tmp_path / "model.onnx", [node], inputs, {"w": floats(8, 8)})
    assert main([str(path), "--json", "--shape", "time=3", "--shape", "x.2=5,batch=2"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["sizes"] == {"batch": 2, "time": 3, "x.2": 5}
    assert found["work"]["multiply_adds"] == math.prod((2, 3, 5, 8, 8))
    assert found["notes"] == []
    assert main([str(path)]) == 0
    assert "assumed size 1 for time, x.2" in capsys.readouterr().out
    assert main([str(path), "--shape", "width=3"]) == 1
    assert "batch, time, x.2" in capsys.readouterr().err


def test_external_data_is_measured_and_missed(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save(tmp_path / "model.onnx", [node], [graphs.info("x", ["batch", 100])], {"w": floats(100, 50)})
    inside = inspect_graph(path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    outside = inspect_graph(path)
    assert outside.file_bytes == path.stat().st_size + (tmp_path / "weights").stat().st_size
    assert (outside.parameters, outside.work) == (inside.parameters, inside.work)
    assert not [note for note in outside.notes if "inferred" in note]
    (tmp_path / "weights").unlink()
    with pytest.raises(ExportError, match="weights"):
        inspect_graph(path)


def test_local_functions_are_opened(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Relu", ["c"], ["d"])]
    opset = helper.make_opsetid("", 20)
    function = helper.make_function("mine", "Dense", ["a", "b"], ["d"], body, [opset])
    graph = helper.make_graph(
        [helper.make_node("Dense", ["x", "w"], ["y"], domain="mine")],
        "graph",
        [graphs.info("x", ["batch", 4])],
        [graphs.info("y", ["batch", 6])],
        [onnx.numpy_helper.from_array(floats(4, 6), "w")],
    )
    opsets = [opset, helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    found = inspect_graph(tmp_path / "model.onnx")
    assert (found.operators, found.work.multiply_adds) == ({"MatMul": 1, "Relu": 1}, 24)


@pytest.mark.parametrize("name", ["mul_1.onnx", "sigmoid.onnx", "logreg_iris.onnx"])
def test_graphs_from_elsewhere(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([datasets.get_example(name)]) == 0
    printed = capsys.readouterr().out
    assert "operators" in printed
    assert "inferred" not in printed


@pytest.mark.parametrize(
    "graph",
    [graphs.sequence_output(), graphs.identity(["n"], TensorProto.STRING), graphs.gather()],
    ids=["sequence", "strings", "indices"],
)
def test_unusual_types_are_described(
    graph: onnx.GraphProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(graphs.write_model(tmp_path, graph))]) == 0
    assert "input        x: " in capsys.readouterr().out


def test_unknown_rank_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    assert main([str(save(tmp_path / "model.onnx", nodes, [graphs.info("x", None)], {}))]) == 0
    printed = capsys.readouterr().out
    assert "x: FLOAT of unknown shape" in printed
    assert "1 x Relu (shape unknown)" in printed


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"not a graph\n",
        "cut": content[: len(content) // 2],
        "a name that is no text": content.replace(b"Conv", b"C\xff\xfev"),
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_file_is_one_line_and_the_others_go_on(
    kind: str, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = exported.version / "model.onnx"
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(damaged(good.read_bytes())[kind])
    assert main([str(bad), str(tmp_path / "none"), str(exported.entry)]) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True], printed.err
    assert "bad.onnx" in lines[0]
    assert "no such file" in lines[1]
    assert printed.out.startswith(str(exported.version))


def test_entry_means_the_default_graph_of_the_largest_version(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        graphs.write_model(tmp_path, graphs.addition(), version)
    assert inspect_graph(tmp_path).path == str(tmp_path / "10" / "model.onnx")
    path = tmp_path / "10" / "model_int8.onnx"
    (tmp_path / "10" / "model.onnx").rename(path)
    assert inspect_graph(tmp_path).path == str(path)
    onnx.save(onnx.load(path), tmp_path / "10" / "other.onnx")
    with pytest.raises(ExportError, match=r"model_int8\.onnx, other\.onnx"):
        inspect_graph(tmp_path)
    (tmp_path / "config.pbtxt").write_text('default_model_filename: "other.onnx"')
    assert inspect_graph(tmp_path).path.endswith("10/other.onnx")
    assert inspect_graph(tmp_path / "10").path.endswith("10/other.onnx")
