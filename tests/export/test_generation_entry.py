"""The entry that a server writes texts with: its config, and what stays of it when it is exported again."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from google.protobuf import text_format

from export.__main__ import main
from export.model_config import Served, config_file, generation
from export.pipeline import export
from export.settings import ExportSettings, GraphOptions
from export.source import Source
from serve.pb import model_config_pb2
from train.family import Generation
from train.gpt_serving import language_graphs
from train.transformer import GPT, initialize

if TYPE_CHECKING:
    from pathlib import Path


CONTEXT = 48
PARAMETERS = {
    "context_length": str(CONTEXT),
    "past_length": "past_length",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
    "past_present_share_buffer": "true",
}


@cache
def source(context: int = CONTEXT, *, both: bool = False) -> Source:
    """A GPT that was not trained, of one small block; its graph with a cache, or both."""
    ids = np.random.default_rng(0).integers(0, 65, 4000)
    network = GPT(
        vocabulary=65, layers=1, heads=2, width=16, context=context,
        dropout=0.0, channel_dropout=0.0, bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    initialize(network, "gpt2")
    graphs = language_graphs(network.eval(), ids, ids)
    return Source("gpt", graphs if both else graphs[1:], {}, {"tokenizer.json": b"{}"})


def write(repository: Path, source: Source, **settings: Any) -> list[str]:
    """Export in fp32; what was said."""
    said: list[str] = []
    export(source, ExportSettings(repository, "x86", ("fp32",), **settings), said.append)
    return said


def read(repository: Path, name: str = "gpt_generate") -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig()
    text_format.Parse((repository / name / "config.pbtxt").read_text(), config)
    return config


def parameters(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation") / "models"
    (path / "gpt_decode" / "1").mkdir(parents=True)  # as earlier exports called it
    write(path, source(both=True))
    return path


def test_the_config_says_how_texts_are_written(repository: Path) -> None:
    assert sorted(path.name for path in repository.iterdir()) == ["gpt", "gpt_decode", "gpt_generate"]
    config = read(repository)
    assert {field.name for field, _ in config.ListFields()} == {
        "name", "backend", "default_model_filename", "model_transaction_policy", "parameters",
    }  # fmt: skip
    assert config.model_transaction_policy.decoupled
    assert parameters(config) == PARAMETERS
    assert not read(repository, "gpt").HasField("model_transaction_policy")


def test_the_config_names_the_tensors_of_the_graph_and_of_its_samples(repository: Path) -> None:
    version = repository / "gpt_generate" / "1"
    graph = onnx.load(version / read(repository).default_model_filename).graph
    named = {
        value.replace("%d", "0")
        for name, value in PARAMETERS.items()
        if name not in ("context_length", "past_present_share_buffer")
    }
    assert {"input_ids", "logits", *named} == {value.name for value in (*graph.input, *graph.output)}
    golden = np.load(version / "golden.npz")
    rows = {key.partition(".")[2] for key in golden.files if not key.startswith("tolerance.")}
    assert rows == {value.name for value in (*graph.input, *graph.output)}
    assert (version / "tokenizer.json").read_bytes() == b"{}"


def test_what_a_user_set_stays_and_the_graphs_own_is_written_again(repository: Path, tmp_path: Path) -> None:
    config = read(repository)
    config.parameters["max_num_seqs"].string_value = "4"
    config.parameters["eos_token_id"].string_value = "7"
    config.parameters["context_length"].string_value = "999"
    config.model_transaction_policy.decoupled = False
    entry = tmp_path / "gpt_generate"
    entry.mkdir()
    (entry / "config.pbtxt").write_text(text_format.MessageToString(config))
    write(tmp_path, source())
    assert parameters(read(tmp_path)) == {**PARAMETERS, "max_num_seqs": "4", "eos_token_id": "7"}
    assert not read(tmp_path).model_transaction_policy.decoupled


def test_a_version_of_another_context_is_said_not_to_fit(tmp_path: Path) -> None:
    write(tmp_path, source())
    said = write(tmp_path, source(context=40), version=2)
    assert (
        "note: version 2 has other cache tensors or another context length than config.pbtxt described up to "
        "now: version 1 can't be served beside it"
    ) in said
    assert parameters(read(tmp_path))["context_length"] == "40"


def test_a_batch_of_one_writes_one_text_at_a_time(tmp_path: Path) -> None:
    said = write(tmp_path, source(), options=GraphOptions(fixed={"batch": 1}))
    assert parameters(read(tmp_path)) == {**PARAMETERS, "max_num_seqs": "1"}
    assert not any(line.startswith("note: gpt_generate") for line in said)
    said = write(tmp_path, source())
    assert (
        "note: gpt_generate's config.pbtxt keeps max_num_seqs 1; remove it to have several texts at a time"
        in said
    )


def test_a_constant_batch_leaves_the_entry_out(tmp_path: Path) -> None:
    said = write(tmp_path, source(both=True), options=GraphOptions(fixed={"batch": 4}))
    assert [path.name for path in tmp_path.iterdir()] == ["gpt"]
    assert any(line.startswith("note: no gpt_generate: --fix batch=4") for line in said)


def served(*, batched: bool = True, generates: bool = True) -> Served:
    texts = Generation(
        CONTEXT, "past_length", "past_key_values.%d.key", "past_key_values.%d.value", "present.%d.key",
        "present.%d.value", past_present_share_buffer=True,
    )  # fmt: skip
    return Served("model.onnx", 8 if batched else 0, generation=texts if generates else None)


def make_config(
    before: model_config_pb2.ModelConfig, model: ir.Model, how: Served
) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig()
    text_format.Parse(config_file("net", model, how, before), config)
    return config


@pytest.fixture(scope="module")
def model(repository: Path) -> ir.Model:
    return ir.load(repository / "gpt_generate" / "1" / "model.onnx")


def test_rows_that_change_each_other_are_written_one_at_a_time(model: ir.Model) -> None:
    first = make_config(model_config_pb2.ModelConfig(), model, served(batched=False))
    assert parameters(first) == {**PARAMETERS, "max_num_seqs": "1"}
    own = make_config(model_config_pb2.ModelConfig(), model, served())
    own.parameters["max_num_seqs"].string_value = "4"
    assert parameters(make_config(own, model, served(batched=False)))["max_num_seqs"] == "1"


def test_an_entry_may_become_one_that_writes_no_texts_and_back(model: ir.Model) -> None:
    texts = make_config(model_config_pb2.ModelConfig(), model, served())
    plain = make_config(texts, model, served(generates=False))
    assert not plain.HasField("model_transaction_policy")
    assert generation(plain) == parameters(plain) == {}
    assert plain.max_batch_size == 8
    assert len(plain.input) == 4
    again = make_config(plain, model, served())
    assert again == texts


def test_inspect_and_compare_take_the_entry(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = str(repository / "gpt_generate")
    assert main(["inspect", entry]) == 0
    assert "past_key_values.0.key" in capsys.readouterr().out
    assert main(["compare", entry, entry]) == 0
    assert "logits" in capsys.readouterr().out
