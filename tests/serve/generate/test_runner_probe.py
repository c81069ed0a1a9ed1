"""A graph that generates wrongly doesn't serve, and one whose rows change each other runs them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from serve.errors import ModelLoadError
from serve.generate.growing_cache import GrowingCache
from serve.generate.probe import probe
from tests.serve.generate.decoders import (
    CONTEXT,
    DATA,
    GROWING,
    INT4,
    NAMES,
    THIRD_PARTY,
    golden,
    open_runner,
    runner_of,
)
from tests.serve.generate.random_steps import RandomSteps, sequence

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from serve.generate.runner import Runner

IN_PLACE = THIRD_PARTY["genai"].parameters


def opened(model: onnx.ModelProto, folder: Path, parameters: Mapping[str, str] = GROWING) -> Runner:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return open_runner(path, parameters, CONTEXT)


def gpt2() -> onnx.ModelProto:
    return onnx.load(DATA / "gpt2_optimum.onnx")


def put_before(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> None:
    """Have whoever reads a tensor read `NAME_changed`, which the nodes make of it."""
    for node in model.graph.node:
        for index, taken in enumerate(node.input):
            if taken == name:
                node.input[index] = f"{name}_changed"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def constant(model: onnx.ModelProto, name: str, value: object) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return name


@pytest.mark.parametrize("name", NAMES)
def test_good_graphs_pass(name: str, tmp_path: Path) -> None:
    runner = runner_of(name, tmp_path)
    assert probe(runner) == ()
    assert runner.most_rows == 16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context_length", [2, 3])
def test_the_shortest_contexts_pass(name: str, context_length: int, tmp_path: Path) -> None:
    long = runner_of(name, tmp_path)
    long.context_length = context_length
    assert probe(long) == ()


def test_four_bits_pass_and_run_together() -> None:
    runner = open_runner(DATA / INT4.file, INT4.parameters, CONTEXT)
    assert probe(runner) == ()
    assert runner.most_rows == 16


def test_half_precision_passes(tmp_path: Path) -> None:
    runner = opened(convert_float_to_float16(gpt2()), tmp_path)
    assert runner.graph.cache.dtype == np.float16
    assert probe(runner) == ()
    assert runner.cache.read(0, 0, [1, 2, 3]).dtype == np.float32
    assert runner.cache.decode([0], [4], [3])[0].dtype == np.float32


def test_one_slot_needs_no_second(tmp_path: Path) -> None:
    runner = runner_of("genai", tmp_path, slots=1)
    assert probe(runner) == ()


def test_a_cache_that_concatenates_group_queries_runs_equal_lengths() -> None:
    """Without the parameter that says so, its buffer isn't shared, and its rows can't be padded."""
    runner = open_runner(DATA / "llama_genai.onnx", {**GROWING, "head_size": IN_PLACE["head_size"]}, CONTEXT)
    assert probe(runner) == ()
    texts = golden("genai")
    sequences = [sequence(prompt, 40) for prompt in texts.prompts]
    RandomSteps(runner, 0).generate(sequences)
    assert [row.ids[row.prompt_length :] for row in sequences] == [tokens[:40] for tokens in texts.tokens]


def test_rows_of_one_range_run_alone(tmp_path: Path) -> None:
    """Dynamic quantization takes one range for all rows: one client's text would change another's."""
    path = tmp_path / "int8.onnx"
    quantize_dynamic(DATA / "gpt2_optimum.onnx", path, op_types_to_quantize=["MatMul", "Gemm"])
    runner = open_runner(path, GROWING, CONTEXT)
    (reason,) = probe(runner)
    assert reason.startswith("texts are not run together: what one says changes another's logits by")
    assert runner.most_rows == 1


def test_rows_whose_padding_is_seen_run_with_their_equals(tmp_path: Path) -> None:
    model = gpt2()
    nothing, one = constant(model, "nothing", 0), constant(model, "one", 1)
    nodes = [
        helper.make_node("Mul", ["attention_mask", nothing], ["zeros"]),
        helper.make_node("Add", ["zeros", one], ["attention_mask_changed"]),
    ]
    put_before(model, "attention_mask", nodes)
    runner = opened(model, tmp_path)
    (reason,) = probe(runner)
    assert reason.startswith("only texts of equal length are run together: logits are")
    assert isinstance(runner.cache, GrowingCache)
    assert runner.cache.equal_lengths
    assert runner.most_rows == 16


def test_a_place_beyond_the_graphs_positions_is_an_error() -> None:
    runner = open_runner(DATA / "gpt2_optimum.onnx", GROWING, CONTEXT + 1)
    with pytest.raises(ModelLoadError, match=f"'context_length' is {CONTEXT + 1}, but the graph can't read"):
        probe(runner)


def test_keys_taken_for_values_are_an_error() -> None:
    swapped = {"past_key_names": "past_key_values.%d.value", "past_value_names": "past_key_values.%d.key"}
    with pytest.raises(ModelLoadError, match="differently when a text is read in two runs instead of one"):
        probe(open_runner(DATA / "gpt2_optimum.onnx", swapped, CONTEXT))


def test_a_graph_that_copies_its_cache_is_an_error(tmp_path: Path) -> None:
    model = onnx.load(DATA / "llama_genai.onnx")
    nothing = constant(model, "nothing", np.float32(0))
    name = "past_key_values.0.key"
    put_before(model, name, [helper.make_node("Add", [name, nothing], [f"{name}_changed"])])
    with pytest.raises(ModelLoadError, match="doesn't write its cache in place: 24 tokens touched"):
        probe(opened(model, tmp_path, IN_PLACE))


def test_a_cache_that_grows_is_none_in_place() -> None:
    parameters = {**GROWING, "past_present_share_buffer": "true"}
    with pytest.raises(ModelLoadError, match=r"can't write its cache in place: .*onnxruntime"):
        probe(open_runner(DATA / "gpt2_optimum.onnx", parameters, CONTEXT))


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    model = gpt2()
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    nan = constant(model, "nan", np.float32("nan"))
    model.graph.node.append(helper.make_node("Mul", ["scores", nan], ["logits"]))
    with pytest.raises(ModelLoadError, match=r"output 'logits' \(logits\): expected finite numbers"):
        probe(opened(model, tmp_path))
