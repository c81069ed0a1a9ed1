"""What a language model is exported with: rows of its text, and the metric that they are judged by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from train.decoding import CachedGPT
from train.family import ExampleInputs, Generation, Metric, ServingData, ServingGraph

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.transformer import GPT

INPUT = "input_ids"
PAST_LENGTH = "past_length"
PAST = "past_key_values"
PRESENT = "present"
OUTPUT = "logits"
ROWS = 64
DECODE_WINDOW = 32
# Two FP32 numbers per layer and channel for each token of each row, and the graph answers with as many again.
CACHE_BYTES = 96 * 2**20


def nats(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
    """Nats per token of logits FP32 [rows, time, vocabulary] against ids INT64 [rows, time]."""
    logits = torch.from_numpy(outputs[OUTPUT]).double().flatten(0, 1)
    return float(functional.cross_entropy(logits, torch.from_numpy(targets).flatten()))


def perplexity(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
    """The exponential of `nats`."""
    return math.exp(nats(outputs, targets))


PERPLEXITY = Metric("perplexity", higher_is_better=False, score=perplexity, relative=True)


def language_graphs(model: GPT, fitted: np.ndarray, test: np.ndarray) -> tuple[ServingGraph, ServingGraph]:
    """Whole texts to the logits of every next token; and the same with a cache, for a server to write with.

    Args:
        model: on the CPU, in evaluation mode.
        fitted: ids INT64 [n] of the train split, more than a context.
        test: ids INT64 [m] of the test split, more than a context.
    """
    return plain_graph(model, fitted, test), decode_graph(CachedGPT(model).eval(), fitted, test)


def windows(ids: np.ndarray, length: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """At most `rows` windows INT64 [rows, length], evenly over ids INT64 [n], and their next tokens."""
    starts = np.linspace(0, len(ids) - 1 - length, min(rows, (len(ids) - 1) // length)).astype(np.int64)
    both = ids[starts[:, None] + np.arange(length + 1)]
    return both[:, :-1], both[:, 1:]


def plain_graph(model: GPT, fitted: np.ndarray, test: np.ndarray) -> ServingGraph:
    """INT64 [batch, time] to FP32 [batch, time, vocabulary]."""
    calibration, _ = windows(fitted, model.context)
    held_out, targets = windows(test, model.context)
    example = torch.from_numpy(calibration[[0, -1]])
    others = tuple({INPUT: held_out[:4, :length]} for length in (1, model.context // 2 + 1))
    return ServingGraph(
        suffix="",
        module=model,
        example=ExampleInputs({INPUT: example}, {INPUT: {0: "batch", 1: "time"}}, (OUTPUT,)),
        data=ServingData({INPUT: calibration}, {INPUT: held_out}, targets, other_shapes=others),
        metric=PERPLEXITY,
    )


def decode_graph(network: CachedGPT, fitted: np.ndarray, test: np.ndarray) -> ServingGraph:
    """Ids, past lengths and caches to logits and caches: see `train.decoding.CachedGPT`.

    Each held-out row asks what follows one token after a past of its own length. The other shapes: first
    chunks of prompts that fill the cache, a later chunk, single tokens in a longer cache.
    """
    context = network.gpt.context
    short, long = min(context, DECODE_WINDOW), min(context, 8 * DECODE_WINDOW)
    rows = decode_rows(network, short)
    calibration, _ = single_tokens(network, fitted, short, 16)
    held_out, targets = single_tokens(network, test, short, rows)
    first = feed(network, windows(test, short // 2, 3)[0], past=np.zeros(3, np.int64), time=short // 2)
    past = long // 3
    later = feed(network, windows(test, long, 1)[0], past=np.array([past]), time=long - past)
    longer, _ = single_tokens(network, test, long, 2)
    two = windows(fitted, short)[0][[0, -1]]
    example = feed(network, two, past=np.array([0, short - 2]), time=2)
    axes = {name: {0: "batch", 2: "cache"} for name in network.names(PAST)}
    return ServingGraph(
        suffix="_generate",
        module=network,
        example=ExampleInputs(
            {name: torch.from_numpy(array) for name, array in example.items()},
            {INPUT: {0: "batch", 1: "time"}, PAST_LENGTH: {0: "batch"}, **axes},
            (OUTPUT, *network.names(PRESENT)),
        ),
        data=ServingData(calibration, held_out, targets, other_shapes=(first, later, longer)),
        metric=PERPLEXITY,
        generation=generation(context),
    )


def generation(context: int) -> Generation:
    """How texts of at most `context` tokens are written: see `CachedGPT.names`."""
    return Generation(
        context_length=context,
        past_length=PAST_LENGTH,
        past_key_names=f"{PAST}.%d.key",
        past_value_names=f"{PAST}.%d.value",
        present_key_names=f"{PRESENT}.%d.key",
        present_value_names=f"{PRESENT}.%d.value",
        past_present_share_buffer=True,  # as onnxruntime's GroupQueryAttention has it
    )


def decode_rows(network: CachedGPT, cache: int) -> int:
    """How many rows of a cache fit the memory that is meant for them, from 16 to 512."""
    row = sum(array.nbytes for array in network.empty_cache(1, cache))
    return max(16, min(CACHE_BYTES // row, 512))


def single_tokens(
    network: CachedGPT, ids: np.ndarray, length: int, rows: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Feeds of one token a row after pasts of all lengths from 0 to below `length`, and the tokens after it.

    Returns:
        The feeds, and INT64 [rows, 1].
    """
    tokens, following = windows(ids, length, rows)
    past = np.linspace(0, length - 1, len(tokens)).astype(np.int64)
    return feed(network, tokens, past, time=1), np.take_along_axis(following, past[:, None], axis=1)


@torch.no_grad()
def feed(network: CachedGPT, tokens: np.ndarray, past: np.ndarray, time: int) -> dict[str, np.ndarray]:
    """Feeds of `time` tokens of each window INT64 [rows, length] after `past` INT64 [rows] others.

    The caches are as long as the windows and hold all of their tokens: a graph that doesn't stop at the past
    length sees the future.
    """
    ids = torch.from_numpy(tokens)
    nothing = torch.zeros(len(ids), 1, dtype=torch.int64)
    _, *caches = network.hidden(ids, nothing, *network.empty_cache(*ids.shape))
    return {
        INPUT: np.take_along_axis(tokens, past[:, None] + np.arange(time), axis=1),
        PAST_LENGTH: past[:, None],
        **dict(zip(network.names(PAST), map(torch.Tensor.numpy, caches), strict=True)),
    }
