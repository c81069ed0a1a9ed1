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
from train.decoding import CachedGPT
from train.gpt_serving import decode_graph
from train.transformer import GPT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve.generate.runner import Cache

DATA = Path(__file__).parent / "data"
NEW_TOKENS = 256
CONTEXT = 384
ROWS = 16
LEAST_MARGIN = 1e-3  # of the two likeliest tokens; below it, another order of addition can turn them round
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
def our_network() -> GPT:
    """Random weights, so large that a token depends on those far back; small ones repeat one token."""
    torch.manual_seed(7)
    network = GPT(
        vocabulary=256, layers=2, heads=4, width=64, context=CONTEXT,
        dropout=0.0, channel_dropout=0.0, bias=True,
    )  # fmt: skip
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if weights.dim() == 2:
                torch.nn.init.normal_(weights, std=0.5 if "tokens" in name or "positions" in name else 0.2)
    return network.eval()


@cache
def our_golden() -> Golden:
    """Prompts of which no token is a near tie."""
    random = np.random.default_rng(1)
    prompts: list[list[int]] = []
    tokens: list[list[int]] = []
    while len(prompts) < ROWS:
        lengths = random.integers(1, 120, ROWS)
        texts = torch.from_numpy(random.integers(0, 256, (ROWS, CONTEXT)))
        ours, margins = our_greedy(texts, torch.from_numpy(lengths))
        for text, length, margin in zip(ours, lengths.tolist(), margins, strict=True):
            if margin > LEAST_MARGIN and len(prompts) < ROWS:
                prompts.append(text[:length])
                tokens.append(text[length:])
    return Golden(prompts, tokens)


@torch.no_grad()
def our_greedy(texts: torch.Tensor, lengths: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    """What torch makes of the first tokens of each row; and how near the nearest tie was.

    Written with a cache, and confirmed without: each token is the likeliest when its text is read anew.
    """
    network = CachedGPT(our_network()).eval()
    rows = torch.arange(len(texts))
    cache_ = list(network.empty_cache(*texts.shape))
    longest = int(lengths.max())
    nothing = torch.zeros(len(texts), 1, dtype=torch.int64)
    states, *cache_ = network.hidden(texts[:, :longest], nothing, *cache_)
    scores, ends = our_network().logits(states[rows, lengths - 1]), lengths.clone()
    for _ in range(NEW_TOKENS):
        texts[rows, ends] = scores.argmax(-1)
        scores, *cache_ = network(texts[rows, ends][:, None], ends[:, None], *cache_)
        scores, ends = scores[:, -1], ends + 1
    written = lengths[:, None] + torch.arange(NEW_TOKENS)
    anew = our_network()(texts)[rows[:, None], written - 1]
    assert torch.equal(anew.argmax(-1), texts[rows[:, None], written])
    best = anew.topk(2).values
    margins = (best[..., 0] - best[..., 1]).amin(1)
    return [text[:end] for text, end in zip(texts.tolist(), ends.tolist(), strict=True)], margins.tolist()


@cache
def our_graph() -> bytes:
    """The decode graph that our exporter writes."""
    ids = np.random.default_rng(0).integers(0, 256, 4 * CONTEXT)
    serving = decode_graph(CachedGPT(our_network()).eval(), ids, ids)
    return serialize(export_graph(serving.module, serving.example))


def graph_file(name: str, folder: Path) -> Path:
    if name != OURS:
        return DATA / THIRD_PARTY[name].file
    path = folder / "ours.onnx"
    path.write_bytes(our_graph())
    return path


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
    return open_runner(graph_file(name, folder), parameters, CONTEXT, slots)


def greedy(cache_: Cache, slot: int, prompt: list[int], count: int) -> list[int]:
    """Tokens after a prompt, read as one chunk, alone."""
    tokens = [int(cache_.read(slot, 0, prompt).argmax())]
    while len(tokens) < count:
        past = len(prompt) + len(tokens) - 1
        tokens.append(int(cache_.decode([slot], [tokens[-1]], [past])[0].argmax()))
    return tokens
