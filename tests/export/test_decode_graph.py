"""The graph with a cache: it writes what the network in torch writes, whatever way it is run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch

from export.graph import export_graph, serialize
from export.session import Session
from tests.language_model import CONTEXT, language_model
from train.decoding import CachedGPT
from train.gpt_serving import language_graphs
from train.transformer import GPT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from train.family import ServingGraph

    Arrays = Mapping[str, np.ndarray]

LAYERS, HEADS, HEAD_WIDTH = 2, 4, 16
SAME = 1e-5
CACHES = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


@pytest.fixture(scope="module")
def serving() -> ServingGraph:
    model = language_model()
    return language_graphs(model.network, model.fitted, model.test)[1]


@pytest.fixture(scope="module")
def graph(serving: ServingGraph) -> ir.Model:
    return export_graph(serving.module, serving.example)


@pytest.fixture(scope="module")
def session(graph: ir.Model) -> Session:
    return Session(serialize(graph))


@pytest.fixture(scope="module")
def network() -> GPT:
    return language_model().network


class Writer:
    """Rows of caches that a graph reads and writes; in place, or by copying its answers back."""

    def __init__(self, session: Any, rows: int, cache: int = CONTEXT, *, in_place: bool = True) -> None:
        self.session = session
        self.in_place = in_place
        # Whatever stands in an unused cache must not matter.
        garbage = np.random.default_rng(0).normal(0, 100, (rows, HEADS, cache, HEAD_WIDTH)).astype(np.float32)
        self.caches = {name: onnxruntime.OrtValue.ortvalue_from_numpy(garbage.copy()) for name in CACHES}

    def cache(self, name: str) -> np.ndarray:
        array: np.ndarray = self.caches[name].numpy()
        return array

    def read(self, ids: np.ndarray, past: list[int]) -> np.ndarray:
        """Logits FP32 [rows, 1, vocabulary] after the last of ids INT64 [rows, time]."""
        feeds = {"input_ids": ids, "past_length": np.array(past)[:, None]}
        if not self.in_place:
            given = {f"past_key_values.{name}": self.cache(name) for name in CACHES}
            logits, *present = self.session.run(None, {**feeds, **given})
            answered = map(onnxruntime.OrtValue.ortvalue_from_numpy, present)
            self.caches = dict(zip(CACHES, answered, strict=True))
        else:
            binding = self.session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, value in self.caches.items():
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_output("logits")
            for name, value in self.caches.items():
                binding.bind_ortvalue_output(f"present.{name}", value)
            self.session.run_with_iobinding(binding)
            logits = binding.get_outputs()[0].numpy()
        result: np.ndarray = logits
        return result

    def read_row(self, row: int, prompt: np.ndarray) -> np.ndarray:
        """Logits FP32 [1, vocabulary] after a prompt that fills an empty row."""
        alone = Writer(self.session, 1, self.cache(CACHES[0]).shape[2], in_place=self.in_place)
        logits = alone.read(prompt[None], [0])
        for name in CACHES:
            self.cache(name)[row] = alone.cache(name)[0]
        return logits[:, 0]


def write(writer: Writer, prompts: list[np.ndarray], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the prompts, one by one, then write: ids [rows, tokens], logits [rows, tokens, vocabulary]."""
    logits = [np.concatenate([writer.read_row(row, prompt) for row, prompt in enumerate(prompts)])]
    lengths = np.array([len(prompt) for prompt in prompts])
    for step in range(tokens - 1):
        ids = logits[-1].argmax(axis=1)
        logits.append(writer.read(ids[:, None], list(lengths + step))[:, 0])
    stacked = np.stack(logits, axis=1)
    return stacked.argmax(axis=2), stacked


@torch.no_grad()
def write_uncached(network: GPT, prompt: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of one prompt by the network in torch, which reads the whole text for each token."""
    ids, logits = torch.from_numpy(prompt)[None], []
    for _ in range(tokens):
        logits.append(network(ids)[0, -1])
        ids = torch.cat([ids, logits[-1].argmax()[None, None]], dim=1)
    return ids[0, len(prompt) :].numpy(), torch.stack(logits).numpy()


def prompts(*lengths: int) -> list[np.ndarray]:
    test = language_model().test
    return [test[100 * row : 100 * row + length] for row, length in enumerate(lengths)]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= SAME * np.abs(expected).max()


def test_the_graph_is_one_operator_per_attention(graph: ir.Model) -> None:
    names = [f"past_key_values.{name}" for name in CACHES]
    shapes = {value.name: str(value.shape) for value in (*graph.graph.inputs, *graph.graph.outputs)}
    cache = f"[batch,{HEADS},cache,{HEAD_WIDTH}]"
    vocabulary = language_model().network.tokens.num_embeddings
    assert shapes == {
        "input_ids": "[batch,time]",
        "past_length": "[batch,1]",
        **dict.fromkeys(names, cache),
        "logits": f"[batch,1,{vocabulary}]",
        **{f"present.{name}": cache for name in CACHES},
    }
    assert dict(graph.opset_imports) == {"": 20, "com.microsoft": 1}
    operators = [node.op_type for node in graph.graph]
    assert operators.count("GroupQueryAttention") == LAYERS
    assert not {"Softmax", "Split", "Concat", "ScatterND", "ScatterElements"}.intersection(operators)


def test_greedy_tokens_are_torchs(session: Session, network: GPT) -> None:
    (prompt,) = prompts(50)
    ids, logits = write(Writer(session._session, 1), [prompt], 200)
    expected_ids, expected = write_uncached(network, prompt, 200)
    assert ids[0].tolist() == expected_ids.tolist()
    assert_close(logits[0], expected)
    assert len(set(ids[0].tolist())) > 2  # not one letter for ever


def test_rows_of_different_lengths_write_as_alone(session: Session) -> None:
    four = prompts(1, 90, 30, 7)
    ids, logits = write(Writer(session._session, 4), four, 60)
    for row, prompt in enumerate(four):
        alone_ids, alone = write(Writer(session._session, 1), [prompt], 60)
        assert ids[row].tolist() == alone_ids[0].tolist()
        assert_close(logits[row : row + 1], alone)


@pytest.mark.parametrize("sizes", [(64, 64, 64), (1, 100, 91), (191, 1), (3,) * 64, (1,) * 200])
@torch.no_grad()
def test_a_prompt_in_chunks_is_a_prompt_at_once(
    session: Session, network: GPT, sizes: tuple[int, ...]
) -> None:
    prompt = prompts(sum(sizes))[0][None]
    whole, pieces = Writer(session._session, 1), Writer(session._session, 1)
    whole.read(prompt, [0])
    expected = network(torch.from_numpy(prompt)).numpy()
    ends = np.cumsum(sizes)
    found = [
        pieces.read(prompt[:, end - size : end], [int(end - size)])
        for end, size in zip(ends, sizes, strict=True)
    ]
    assert_close(np.concatenate(found, axis=1), expected[:, ends - 1])
    for name in CACHES:
        assert_close(pieces.cache(name)[:, :, : ends[-1]], whole.cache(name)[:, :, : ends[-1]])


def test_in_place_is_the_same_as_copying(session: Session) -> None:
    three = prompts(20, 5, 40)
    in_place, copying = Writer(session._session, 3), Writer(session._session, 3, in_place=False)
    buffers = [in_place.cache(name).ctypes.data for name in CACHES]
    ids, logits = write(in_place, three, 30)
    copied_ids, copied = write(copying, three, 30)
    assert np.array_equal(ids, copied_ids)
    assert np.array_equal(logits, copied)
    for name in CACHES:
        for row, prompt in enumerate(three):
            filled = len(prompt) + 29
            assert np.array_equal(in_place.cache(name)[row, :, :filled], copying.cache(name)[row, :, :filled])
    assert [in_place.cache(name).ctypes.data for name in CACHES] == buffers


def test_a_shorter_cache_is_enough_until_it_is_full(session: Session) -> None:
    (prompt,) = prompts(30)
    ids, _ = write(Writer(session._session, 1, cache=39), [prompt], 10)
    assert ids.tolist() == write(Writer(session._session, 1), [prompt], 10)[0].tolist()
    with pytest.raises(Exception, match="shape"):
        write(Writer(session._session, 1, cache=38), [prompt], 10)


@pytest.mark.parametrize(
    ("time", "past", "message"),
    [
        (2, [4, 0], "batch_size must be 1"),  # the operator's own limit; `CachedGPT` says so
        (1, [CONTEXT, 0], "out of data bounds"),
        (1, [-2, 0], "out of range"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_graph_cannot_do_it_refuses(
    session: Session, time: int, past: list[int], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        Writer(session._session, 2, CONTEXT + 1).read(np.ones((2, time), np.int64), past)


@pytest.mark.parametrize("shape", range(4))
def test_torch_and_graph_agree_on_the_serving_data(
    serving: ServingGraph, session: Session, shape: int
) -> None:
    inputs = (serving.data.held_out, *serving.data.other_shapes)[shape]
    with torch.no_grad():
        original = serving.module(*(torch.from_numpy(inputs[name]) for name in serving.example.tensors))
    for found, expected in zip(session.run(inputs).values(), original, strict=True):
        assert_close(found, expected.numpy())


def test_the_serving_data_are_texts_cut_at_different_lengths(serving: ServingGraph, network: GPT) -> None:
    held_out: Arrays = serving.data.held_out
    assert held_out["input_ids"].shape == serving.data.targets.shape
    past = held_out["past_length"][:, 0]
    cache = held_out["past_key_values.0.key"].shape[2]
    assert set(past.tolist()) == set(range(cache))
    size = sum(array.nbytes for array in held_out.values())
    assert size < 200e6
    # The network without a cache answers the same, given the whole texts.
    starts = np.linspace(0, len(language_model().test) - 1 - cache, len(past)).astype(np.int64)
    costs = []
    for start, length, target in zip(starts, past, serving.data.targets[:, 0], strict=True):
        text = torch.from_numpy(language_model().test[start : start + length + 1])[None]
        with torch.no_grad():
            costs.append(-network(text)[0, -1].log_softmax(dim=0)[target].item())
    with torch.no_grad():
        logits, *_ = serving.module(*map(torch.from_numpy, held_out.values()))
    score = serving.metric.score({"logits": logits.numpy()}, serving.data.targets)
    assert score == pytest.approx(math.exp(np.mean(costs)), rel=1e-5)


@pytest.mark.parametrize("context", [2, 3, 31, 33, CONTEXT])
@torch.no_grad()
def test_whatever_the_context_every_dynamic_axis_has_two_sizes(network: GPT, context: int) -> None:
    short = GPT(
        vocabulary=network.tokens.num_embeddings, layers=1, heads=2, width=32, context=context,
        dropout=0.0, channel_dropout=0.0, bias=False,
    ).eval()  # fmt: skip
    ids = language_model().test
    for serving in language_graphs(short, ids[: context + 1], ids):
        shapes = (serving.data.held_out, *serving.data.other_shapes)
        for name, axes in serving.example.dynamic_axes.items():
            assert serving.example.tensors[name].shape[0] == 2
            for axis in axes:
                assert len({arrays[name].shape[axis] for arrays in shapes}) > 1
        for arrays in shapes:
            serving.module(*(torch.from_numpy(arrays[name]) for name in serving.example.tensors))
            assert arrays.get("past_length", np.zeros(1)).max() + arrays["input_ids"].shape[1] <= context


def test_caches_are_named_and_shaped(network: GPT) -> None:
    cached = CachedGPT(network)
    assert cached.names("present") == tuple(f"present.{name}" for name in CACHES)
    assert [tuple(cache.shape) for cache in cached.empty_cache(3, 9)] == [(3, HEADS, 9, HEAD_WIDTH)] * 4
