"""Static int8 by scheme: types, zero points, what fuses, what stays float, rows that don't meet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.graph import check_graph, export_graph, serialize
from export.int8.calibration import Ranges, calibrate, prepare
from export.int8.quantizable import PRODUCTS, is_product, weighted_nodes
from export.int8.sensitivity import sqnr_db
from export.passes.bias_products import BiasProducts
from export.passes.clean_up import CleanUp
from export.passes.static_int8 import SCHEMES, StaticInt8
from export.session import Session, take
from export.targets import Target, this_target
from train import bert
from train.bert_classification import ServedClassifier
from train.bert_pretraining import ServedWords
from train.sentence_classification import example_inputs, padded_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.export.conftest import Network

CONTEXT = 32
ARGUMENTS = {
    "classes": 2,
    "vocabulary": 400,
    "layers": 2,
    "heads": 2,
    "width": 64,
    "context": CONTEXT,
    "norm": "pre",
    "pooling": "mean",
    "dropout": 0.0,
    "guesses_words": True,
}


@dataclass(frozen=True)
class Prepared:
    model: ir.Model
    fp32: bytes
    ranges: Ranges
    rows: Mapping[str, np.ndarray]

    def int8(self, target: Target, exclude: frozenset[str] = frozenset()) -> ir.Model:
        quantization = StaticInt8(self.ranges, SCHEMES[target], exclude)
        assert quantization.check(self.model) is None
        model = CleanUp().apply(quantization.apply(self.model).model).model
        check_graph(model)
        return model


def sentences(count: int, *, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 400, generator.integers(1, CONTEXT + 1)) for _ in range(count)]


def encoder(**changes: object) -> Prepared:
    torch.manual_seed(0)
    model = cast("bert.Bert", bert.build_model({**ARGUMENTS, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    module = ServedWords(model) if changes.get("serves") == "words" else ServedClassifier(model)
    graph = export_graph(module.eval(), example_inputs(400, CONTEXT))
    rows = padded_inputs(sentences(64, seed=1), CONTEXT)
    prepared = prepare(graph.clone())
    return Prepared(prepared, serialize(graph), calibrate(prepared, rows, "minmax"), rows)


@pytest.fixture(scope="module")
def transformer() -> Prepared:
    return encoder()


@pytest.fixture(scope="module")
def convolutions(network: Network) -> Prepared:
    prepared = prepare(network.graph.clone())
    rows = network.data.calibration
    return Prepared(prepared, serialize(network.graph), calibrate(prepared, rows, "minmax"), rows)


def fused_operators(model: ir.Model, path: Path) -> Counter[str]:
    """What is left of a graph once onnxruntime has optimized it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def dequantized(model: ir.Model) -> dict[str, np.ndarray]:
    """Constant that a DequantizeLinear reads, by its name."""
    return {
        str(value.name): value.const_value.numpy()
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and (value := node.inputs[0]) is not None
        and value.const_value is not None
    }


def multiplied(model: ir.Model) -> list[np.ndarray]:
    """The weights of products, as they are stored."""
    constants = dequantized(model)
    sources = [
        producer.inputs[0]
        for node in model.graph
        if node.op_type in PRODUCTS
        and (weight := node.inputs[1]) is not None
        and (producer := weight.producer()) is not None
    ]
    return [constants[source.name] for source in sources if source and source.name in constants]


def zero_points(model: ir.Model) -> list[np.ndarray]:
    """Of the values that are rounded at run time; a table's rows keep the table's."""
    return [
        value.const_value.numpy()
        for node in model.graph
        if node.op_type == "QuantizeLinear"
        and (source := node.inputs[0]) is not None
        and (producer := source.producer()) is not None
        and producer.op_type != "Gather"
        and (value := node.inputs[2]) is not None
        and value.const_value is not None
    ]


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_types_and_zero_points_are_the_schemes(
    request: pytest.FixtureRequest, kind: str, target: Target
) -> None:
    scheme, model = SCHEMES[target], request.getfixturevalue(kind).int8(target)
    points = zero_points(model)
    assert {point.dtype.name for point in points} == {scheme.activations}
    assert any((point != 0).any() for point in points) is not scheme.symmetric
    weights = multiplied(model)
    assert len(weights) == sum(is_product(node) for node in request.getfixturevalue(kind).model.graph)
    # 7 bits where the processor adds two products in 16; each channel's largest weight takes the last level.
    assert {int(np.abs(array.astype(int)).max()) for array in weights} == {64 if scheme.reduce_range else 127}
    biases = [array for array in dequantized(model).values() if array.dtype == np.int32]
    assert bool(biases) is not scheme.float_bias


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_every_scheme_answers_nearly_what_fp32_does(
    request: pytest.FixtureRequest, kind: str, target: Target
) -> None:
    prepared = request.getfixturevalue(kind)
    rows = take(prepared.rows, 0, 64)
    exact = Session(prepared.fp32).run(rows)["logits"]
    assert sqnr_db(exact, Session(serialize(prepared.int8(target))).run(rows)["logits"]) > 15


def test_a_transformers_products_are_integers_and_the_rest_is_float(
    transformer: Prepared, tmp_path: Path
) -> None:
    fused = fused_operators(transformer.int8("x86-vnni"), tmp_path / "fused.onnx")
    # Six products a layer and the classifier; what multiplies two activations stays float.
    assert fused["QGemm"] == 6 * 2 + 1
    assert fused["MatMul"] + fused["FusedMatMul"] == 2 * 2
    # Each product's input is rounded, that of queries, keys and values once; the one look-up is made float
    # after it, not the whole table.
    assert (fused["QuantizeLinear"], fused["DequantizeLinear"]) == (4 * 2 + 1, 1)
    assert fused["LayerNormalization"] == 2 * 2 + 1
    assert not {"QLinearAdd", "QLinearSoftmax", "SkipLayerNormalization", "Gemm"}.intersection(fused)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_rows_do_not_depend_on_batch_or_padding(norm: str) -> None:
    prepared = encoder(norm=norm, pooling="mean" if norm == "pre" else "cls")
    rows = sentences(16, seed=2)
    padded = padded_inputs(rows, CONTEXT)
    for content, exactly in ((prepared.fp32, False), (serialize(prepared.int8("x86-vnni")), True)):
        session = Session(content)
        alone = np.concatenate([session.run(take(padded, row, row + 1))["logits"] for row in range(16)])
        for start in (0, 8):
            batch = session.run(take(padded, start, start + 8))["logits"]
            assert batch == pytest.approx(alone[start : start + 8], abs=0 if exactly else 1e-5)
        shortest = np.concatenate([session.run(padded_inputs([row], len(row)))["logits"] for row in rows])
        assert shortest == pytest.approx(alone, abs=1e-5)
        assert np.ptp(alone, axis=0).min() > 1e-2


def test_padding_leaves_the_ranges_alone(transformer: Prepared) -> None:
    found = transformer.ranges.bounds
    # The mask's -10 000 is nowhere: what it is added to isn't rounded.
    assert max(abs(bound) for bounds in found.values() for bound in bounds) < 100
    full = {**transformer.rows, "attention_mask": np.ones_like(transformer.rows["attention_mask"])}
    assert calibrate(transformer.model, full, "minmax").bounds.keys() == found.keys()


def test_a_tied_embedding_is_stored_once() -> None:
    prepared = encoder(serves="words")
    int8 = serialize(prepared.int8("x86-vnni"))
    table = 400 * 64
    tables = [array for array in dequantized(prepared.int8("x86-vnni")).values() if array.size == table]
    assert [array.dtype for array in tables] == [np.int8]
    rows = take(prepared.rows, 0, 8)
    exact = Session(prepared.fp32).run(rows)["logits"]
    assert sqnr_db(exact, Session(int8).run(rows)["logits"]) > 15


@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_exclude_leaves_exactly_those_layers_float(request: pytest.FixtureRequest, kind: str) -> None:
    prepared = request.getfixturevalue(kind)
    names = [str(node.name) for node in weighted_nodes(prepared.model.graph)]
    exclude = frozenset((names[0], names[len(names) // 2], names[-1]))
    result = StaticInt8(prepared.ranges, SCHEMES["x86-vnni"], exclude).apply(prepared.model)
    floats = {str(node.name) for node in weighted_nodes(result.model.graph)}
    assert floats == exclude
    assert result.changes == {"quantized weights": len(names) - 3, "weights left float": 3}
    check_graph(CleanUp().apply(result.model).model)


def test_ranges_serve_any_number_of_quantizations(transformer: Prepared, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = serialize(transformer.model)
    first, again = (serialize(transformer.int8("x86-vnni")) for _ in range(2))
    assert first == again
    assert serialize(transformer.model) == before
    assert list(tmp_path.iterdir()) == []


def test_biases_become_part_of_their_products(transformer: Prepared) -> None:
    operators = Counter(node.op_type for node in transformer.model.graph)
    assert operators["Gemm"] == 6 * 2 + 1
    assert operators["MatMul"] == 2 * 2
    assert "is followed by a bias" in str(BiasProducts().check(transformer.model))
    assert "needs opset 15" in str(BiasProducts().check(ir.Model(empty(14), ir_version=10)))


def empty(opset: int) -> ir.Graph:
    return ir.Graph([], [], nodes=[], opset_imports={"": opset})


def test_it_says_why_it_does_not_apply(convolutions: Prepared, transformer: Prepared) -> None:
    wrong = StaticInt8(transformer.ranges, SCHEMES["x86"])
    assert "calibrate the prepared graph that is to be quantized" in str(wrong.check(convolutions.model))
    right = StaticInt8(convolutions.ranges, SCHEMES["x86"])
    assert "already" in str(right.check(convolutions.int8("x86")))
    assert "none of Conv, Gemm, MatMul" in str(right.check(ir.Model(empty(20), ir_version=10)))
    assert "opset 13, the graph has 11" in str(right.check(ir.Model(empty(11), ir_version=6)))
    assert "isn't quantized" in str(CleanUp().check(convolutions.model))


@pytest.mark.parametrize(
    ("machine", "flags", "target"),
    [
        ("x86_64", "fma avx2 avx512f avx512_vnni", "x86-vnni"),
        ("x86_64", "fma avx2 avx_vnni", "x86-vnni"),
        ("AMD64", "fma avx2", "x86"),
        ("aarch64", None, "arm64"),
    ],
)
def test_this_machines_target_is_its_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, target: Target
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr("export.targets.CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert this_target() == target


def test_another_processor_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ExportError, match="'riscv64' is no known target; name one with --target x86-vnni"):
        this_target()
