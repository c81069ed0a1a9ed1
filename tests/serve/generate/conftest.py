"""A repository of generation models: one small graph of our own exporter, under several names."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from export.graph import export_graph, serialize
from train.decoding import CachedGPT
from train.gpt_serving import decode_graph
from train.tokenization import to_json, train_tokenizer
from train.transformer import GPT, initialize

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 256
CONTEXT = 8192
# As many characters as the graph has tokens: of one byte each, of two, and beyond.
ALPHABET = "".join(map(chr, [*range(32, 127), *range(0xA1, 0xA1 + VOCABULARY - 95)]))

CACHE = """
parameters { key: "past_key_names" value { string_value: "past_key_values.%d.key" } }
parameters { key: "past_value_names" value { string_value: "past_key_values.%d.value" } }
parameters { key: "present_key_names" value { string_value: "present.%d.key" } }
parameters { key: "present_value_names" value { string_value: "present.%d.value" } }
parameters { key: "past_present_share_buffer" value { string_value: "true" } }
"""
DECOUPLED = "model_transaction_policy { decoupled: true }"


def parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


def config(*parts: str, context: int = CONTEXT) -> str:
    """The config.pbtxt of a model of this graph."""
    return "\n".join((CACHE, parameter("context_length", context), *parts))


def write_graph(path: Path) -> None:
    """A GPT of two blocks with random weights, its output far enough from uniform that greedy text varies."""
    torch.manual_seed(0)
    network = GPT(
        vocabulary=VOCABULARY, layers=2, heads=2, width=32, context=CONTEXT,
        dropout=0.0, channel_dropout=0.0, bias=True,
    )  # fmt: skip
    initialize(network, "gpt2")
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(8)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 4096)
    serving = decode_graph(CachedGPT(network.eval()).eval(), ids, ids)
    path.write_bytes(serialize(export_graph(serving.module, serving.example)))


def write_generation_model(folder: Path, graph: Path, text: str, tokenizer: bytes | None) -> None:
    """A model's folder: its config, its graph, and its tokenizer if it has one."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text)
    shutil.copy(graph, folder / "1" / "model.onnx")
    if tokenizer is not None:
        (folder / "1" / "tokenizer.json").write_bytes(tokenizer)


def write_twin(folder: Path, model: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(parameter("generation_model", model))


@pytest.fixture(scope="session")
def generation_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph alone."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    write_graph(path)
    return path


@pytest.fixture(scope="session")
def character_tokenizer() -> bytes:
    """A token for each character of `ALPHABET`."""
    return to_json(train_tokenizer("char", (ALPHABET,), 0))


@pytest.fixture(scope="session")
def byte_tokenizer() -> bytes:
    """A token for each byte: random tokens are halves of characters, mostly."""
    return to_json(train_tokenizer("bpe", ("any",), VOCABULARY))


@pytest.fixture(scope="session")
def generation_repository(
    tmp_path_factory: pytest.TempPathFactory,
    generation_graph: Path,
    character_tokenizer: bytes,
    byte_tokenizer: bytes,
) -> Path:
    """Generation models, not to be changed.

    gpt streams text by characters and gpt_unary is its twin; bytes streams text by bytes; ids has no
    tokenizer; once is not decoupled; small has two slots, a queue of one, and stops at a quotation mark.
    """
    root = tmp_path_factory.mktemp("generation_models")
    limits = parameter("max_num_seqs", 2) + parameter("max_queue_size", 1)
    limits += parameter("max_prompt_length", 100) + parameter("eos_token_id", ALPHABET.index('"'))
    for name, text, tokenizer in (
        ("gpt", config(DECOUPLED), character_tokenizer),
        ("bytes", config(DECOUPLED, context=512), byte_tokenizer),
        ("ids", config(DECOUPLED, context=512), None),
        ("once", config(context=512), character_tokenizer),
        ("small", config(DECOUPLED, limits), character_tokenizer),
    ):
        write_generation_model(root / name, generation_graph, text, tokenizer)
    write_twin(root / "gpt_unary", "gpt")
    return root
