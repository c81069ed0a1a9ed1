"""Which tensors a config names, and what is said where they don't fit."""

from __future__ import annotations

import numpy as np
import pytest

from serve.errors import ModelLoadError
from serve.generate.decoder_graph import DecoderGraph
from serve.runtime.session import GraphTensor
from tests.serve.generate.decoders import COMBINED, GROWING, IN_PLACE, message

INT64, FLOAT, HALF, BOOL = "tensor(int64)", "tensor(float)", "tensor(float16)", "tensor(bool)"
IDS = GraphTensor("input_ids", INT64, (-1, -1))
MASK = GraphTensor("attention_mask", INT64, (-1, -1))
POSITIONS = GraphTensor("position_ids", INT64, (-1, -1))
LENGTH = GraphTensor("past_length", INT64, (-1, 1))
LOGITS = GraphTensor("logits", FLOAT, (-1, -1, 99))


def cache(
    template: str, onnx_type: str = FLOAT, shape: tuple[int, ...] = (-1, 4, -1, 8)
) -> list[GraphTensor]:
    return [
        GraphTensor(template % (layer, part), onnx_type, shape)
        for layer in range(3)
        for part in ("key", "value")
    ]


PAST, PRESENT = cache("past_key_values.%d.%s"), cache("present.%d.%s")


def read(
    inputs: list[GraphTensor],
    outputs: list[GraphTensor] | None = None,
    parameters: dict[str, str] | None = None,
) -> DecoderGraph:
    return DecoderGraph.from_config(
        message(GROWING if parameters is None else parameters), inputs, outputs or [LOGITS, *PRESENT]
    )


def test_a_growing_cache() -> None:
    graph = read([*reversed(PAST), MASK, IDS, POSITIONS])
    assert graph.cache.past == tuple(tensor.name for tensor in PAST)
    assert graph.cache.present == tuple(tensor.name for tensor in PRESENT)
    assert (graph.cache.heads, graph.cache.head_size) == (4, 8)
    assert graph.cache.dtype == np.float32
    assert graph.bytes_per_token == 3 * 2 * 4 * 8 * 4
    assert not graph.in_place
    assert graph.cache_length is None
    assert graph.logits.vocabulary == 99
    assert graph.attention_mask
    assert graph.position_ids
    assert not graph.past_length


def test_a_cache_in_place_with_lengths() -> None:
    past = cache("past_key_values.%d.%s", shape=(-1, 4, 64, 8))
    graph = read([IDS, LENGTH, *past])
    assert graph.in_place
    assert graph.cache_length == 64


def test_a_cache_in_place_with_a_mask_in_half_precision() -> None:
    graph = read(
        [IDS, MASK, *cache("past_key_values.%d.%s", HALF)],
        [GraphTensor("logits", HALF, (-1, -1)), *cache("present.%d.%s", HALF)],
        IN_PLACE,
    )
    assert graph.in_place
    assert graph.cache.dtype == np.float16
    assert graph.logits.dtype == np.float16
    assert graph.logits.vocabulary == 0
    assert graph.bytes_per_token == 3 * 2 * 4 * 8 * 2


def test_keys_and_values_in_one() -> None:
    shape = (2, -1, 4, -1, 8)
    graph = read(
        [IDS, *(GraphTensor(f"past_{n}", FLOAT, shape) for n in range(2))],
        [LOGITS, *(GraphTensor(f"present_{n}", FLOAT, shape) for n in range(2))],
        COMBINED,
    )
    assert graph.cache.combined
    assert graph.cache.shape(3, 5) == (2, 3, 4, 5, 8)
    assert graph.bytes_per_token == 2 * 2 * 4 * 8 * 4


def test_names_of_ones_own() -> None:
    parameters = {
        "input_ids": "ids", "attention_mask": "m", "logits": "scores",
        "past_key_names": "%d.k", "past_value_names": "%d.v",
        "present_key_names": "%d.k.out", "present_value_names": "%d.v.out",
    }  # fmt: skip
    names = [f"{layer}.{part}" for layer in range(2) for part in "kv"]
    graph = read(
        [
            GraphTensor("ids", "tensor(int32)", (-1, -1)),
            GraphTensor("m", FLOAT, (-1, -1)),
            *(GraphTensor(name, FLOAT, (-1, 4, -1, 8)) for name in names),
        ],
        [
            GraphTensor("scores", FLOAT, (-1, -1, 9)),
            *(GraphTensor(f"{name}.out", FLOAT, (-1, 4, -1, 8)) for name in names),
        ],
        parameters,
    )
    assert graph.cache.past == tuple(names)
    assert graph.input_ids.dtype == np.int32
    assert graph.attention_mask
    assert graph.attention_mask.dtype == np.float32
    assert graph.logits.name == "scores"


def test_what_always_is_true() -> None:
    graph = read([IDS, *PAST, GraphTensor("use_cache_branch", BOOL, (1,))])
    assert graph.constants["use_cache_branch"].tolist() == [True]


def test_sizes_from_the_config() -> None:
    past, present = (
        cache(template, shape=(-1, -1, -1, -1)) for template in ("past_key_values.%d.%s", "present.%d.%s")
    )
    parameters = {**GROWING, "num_key_value_heads": "2", "head_size": "16"}
    graph = read([IDS, *past], [LOGITS, *present], parameters)
    assert (graph.cache.heads, graph.cache.head_size) == (2, 16)
    with pytest.raises(
        ModelLoadError, match="parameter 'num_key_value_heads' is missing, and input 'past_key_"
    ):
        read([IDS, *past], [LOGITS, *present])
    with pytest.raises(ModelLoadError, match="'head_size' is 'wide', expected a number above 0"):
        read([IDS, *past], [LOGITS, *present], {**parameters, "head_size": "wide"})
    with pytest.raises(ModelLoadError, match="'head_size' is '16', expected 8 as in input"):
        read([IDS, *PAST], parameters={**GROWING, "head_size": "16"})


PASTS = "past_key_values.%d.%s"
PRESENTS = "present.%d.%s"
ENCODER = GraphTensor("encoder_hidden_states", FLOAT, (-1, -1, 8))
COMBINED_PAST = GraphTensor("past_0", FLOAT, (2, -1, 4, -1, 8))
COMBINED_PRESENT = GraphTensor("present_0", FLOAT, (2, -1, 4, -1, 8))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (
            [MASK, *PAST],
            "no input 'input_ids', which parameter 'input_ids' .* it has attention_mask, past_key",
        ),
        ([IDS], "no input 'past_key_values.0.key'"),
        ([IDS, *PAST[:-1]], "not as many layers .* 3 from 'past_key_values.0.key' on"),
        (
            [IDS, *PAST, ENCODER],
            r"'encoder_hidden_states' of the graph .*, \[-1, -1, 8\]\) is needed at every run",
        ),
        ([GraphTensor("input_ids", FLOAT, (-1, -1)), *PAST], r"'input_ids': expected tensor\(int64\) or"),
        ([GraphTensor("input_ids", INT64, (-1,)), *PAST], r"expected shape \[-1, -1\], .* got \[-1\]"),
        ([GraphTensor("input_ids", INT64, (-1, 1)), *PAST], r"expected shape \[-1, -1\], .* got \[-1, 1\]"),
        (
            [IDS, *cache(PASTS, "tensor(int8)")],
            r"'past_key_values.0.key' of the cache: .* got tensor\(int8\)",
        ),
        ([IDS, *cache(PASTS, shape=(-1, 4, 8))], r"got \[-1, 4, 8\]"),
        ([IDS, *cache(PASTS, shape=(7, 4, -1, 8))], "a batch of any size or of 1"),
        ([IDS, *cache(PASTS, shape=(-1, 4, 9, 8))], "any number of tokens, got 9; where the graph writes"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: list[GraphTensor], expected: str) -> None:
    with pytest.raises(ModelLoadError, match=expected):
        read(inputs)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (PRESENT, "no output 'logits'"),
        ([LOGITS], "no output 'present.0.key'"),
        ([LOGITS, *PRESENT[:4]], "2 from 'present.0.key' on"),
        ([GraphTensor("logits", INT64, (-1, -1, 9)), *PRESENT], "'logits': expected tensor"),
        ([GraphTensor("logits", FLOAT, (9,)), *PRESENT], r"\[batch, vocabulary\], got \[9\]"),
        (
            [LOGITS, *cache(PRESENTS, HALF)],
            r"'present.0.key' of the cache: expected .* got tensor\(float16\)",
        ),
        ([LOGITS, *cache(PRESENTS, shape=(-1, 2, -1, 8))], r"'present.0.key' .* got \[-1, 2, -1, 8\]"),
    ],
)
def test_outputs_that_do_not_fit_are_named(outputs: list[GraphTensor], expected: str) -> None:
    with pytest.raises(ModelLoadError, match=expected):
        read([IDS, *PAST], outputs)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({**GROWING, "attention_mask": "mask"}, "no input 'mask', which parameter 'attention_mask'"),
        ({"past_key_names": "past"}, "is 'past', expected a name with one %d"),
        (IN_PLACE, "neither an input 'attention_mask' nor 'past_length'"),
    ],
)
def test_parameters_that_do_not_fit_are_named(parameters: dict[str, str], expected: str) -> None:
    with pytest.raises(ModelLoadError, match=expected):
        read([IDS, *PAST], parameters=parameters)


def test_keys_and_values_in_one_are_not_written_in_place() -> None:
    parameters = {**COMBINED, "past_present_share_buffer": "true"}
    with pytest.raises(ModelLoadError, match="can't be written in place row by row"):
        read([IDS, MASK, COMBINED_PAST], [LOGITS, COMBINED_PRESENT], parameters)
