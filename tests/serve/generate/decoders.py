"""Decoders' graphs of several exporters, with the tokens that torch generates greedily: see data/NOTE.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.graph import export_graph, serialize
from serve.generate.decoder_graph import DecoderGraph
from serve.generate.runner import Runner
from serve.generate.settings import GenerationSettings
from serve.pb import model_config_pb2 as pb
from serve.runtime.session import Session, SessionSettings
from tests.language_model import language_model
from train.decoding import CachedGPT
from train.gpt_serving import decode_graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve.generate.runner import Cache

DATA = Path(__file__).parent / "data"
NEW_TOKENS = 256
CONTEXT = 384
IN_PLACE = {"past_key_names": "past_key_values.%d.key", "past_present_share_buffer": "true"}
GROWING = {"past_key_names": "past_key_values.%d.key"}
COMBINED = {"past_names": "past_%d"}


@dataclass(frozen=True)
class Golden:
    """Prompts and what torch writes after each: INT64 [n] and INT64 [256]."""

    prompts: list[list[int]]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Decoder:
    """A graph, what its config says of it, and its golden tokens."""

    file: str
    golden: str
    parameters: Mapping[str, str] = field(default_factory=lambda: GROWING)


THIRD_PARTY = {
    "optimum": Decoder("gpt2_optimum.onnx", "gpt2"),
    "onnxruntime": Decoder("gpt2_onnxruntime.onnx", "gpt2", COMBINED),
    "genai": Decoder("llama_genai.onnx", "llama", {**IN_PLACE, "head_size": "16"}),
}
OURS = "ours"
NAMES = (OURS, *THIRD_PARTY)
INT4 = Decoder("llama_genai_int4.onnx", "llama", THIRD_PARTY["genai"].parameters)


@cache
def golden(name: str) -> Golden:
    if name == OURS:
        return our_golden()
    with np.load(DATA / f"{THIRD_PARTY[name].golden}_golden.npz") as arrays:
        ends = np.cumsum(arrays["lengths"])[:-1]
        return Golden([p.tolist() for p in np.split(arrays["prompts"], ends)], arrays["tokens"].tolist())


@cache
def our_golden() -> Golden:
    """As many as fit the small network's context, by torch without a cache."""
    model = language_model()
    network = model.network
    ids = model.test
    prompts, tokens = [], []
    for length in (1, 3, 17, 40, 64, 100, 31, 8, 2, 90, 55, 12, 71, 26, 5, 120):
        texts = torch.from_numpy(ids[length * 50 :][:length].copy())[None]
        with torch.no_grad():
            while texts.shape[1] < network.context:
                texts = torch.cat([texts, network(texts)[:, -1:].argmax(-1)], dim=1)
        prompts.append(texts[0, :length].tolist())
        tokens.append(texts[0, length:].tolist())
    return Golden(prompts, tokens)


@cache
def our_graph() -> bytes:
    """The decode graph that our exporter writes."""
    model = language_model()
    serving = decode_graph(CachedGPT(model.network).eval(), model.fitted, model.test)
    return serialize(export_graph(serving.module, serving.example))


def graph_file(name: str, folder: Path) -> Path:
    if name != OURS:
        return DATA / THIRD_PARTY[name].file
    path = folder / "ours.onnx"
    path.write_bytes(our_graph())
    return path


def context(name: str) -> int:
    return language_model().network.context if name == OURS else CONTEXT


def message(parameters: Mapping[str, str]) -> pb.ModelConfig:
    config = pb.ModelConfig()
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def open_runner(path: Path, parameters: Mapping[str, str], context_length: int, slots: int = 16) -> Runner:
    session = Session(path, SessionSettings())
    graph = DecoderGraph.from_config(message(parameters), session.inputs, session.outputs)
    limits = GenerationSettings(
        context_length=context_length, max_prompt_length=context_length - 1, max_num_seqs=slots
    )
    return Runner(session, graph, limits)


def runner_of(name: str, folder: Path, slots: int = 16) -> Runner:
    parameters = GROWING if name == OURS else THIRD_PARTY[name].parameters
    return open_runner(graph_file(name, folder), parameters, context(name), slots)


def greedy(cache_: Cache, slot: int, prompt: list[int], count: int) -> list[int]:
    """Tokens after a prompt, read as one chunk, alone."""
    tokens = [int(cache_.read(slot, 0, prompt).argmax())]
    while len(tokens) < count:
        past = len(prompt) + len(tokens) - 1
        tokens.append(int(cache_.decode([slot], [tokens[-1]], [past])[0].argmax()))
    return tokens
