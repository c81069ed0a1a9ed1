"""config.pbtxt of models that generate: recognised, checked, completed; of others: as before."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from google.protobuf import text_format

from serve.errors import ModelLoadError
from serve.generate.generation_config import (
    PARAMETERS,
    generation_settings,
    is_generation,
    is_twin,
    twin_of,
)
from serve.generate.settings import GenerationSettings
from serve.generate.tensors import generation_model_config
from serve.model.config_pbtxt import check_config
from serve.pb import model_config_pb2 as pb

if TYPE_CHECKING:
    from serve.model.model_config import ModelConfig

CACHE = {"past_key_names": "past_key_values.%d.key"}
TWIN = {"generation_model": "gpt"}
KIB = 1024


def config(parameters: dict[str, str], text: str = "") -> pb.ModelConfig:
    message = text_format.Parse(text, pb.ModelConfig())
    for name, value in parameters.items():
        message.parameters[name].string_value = value
    return message


def checked(parameters: dict[str, str], text: str = "") -> pb.ModelConfig:
    message = config(parameters, text)
    check_config(message, "m")
    return message


def settings(
    parameters: dict[str, str], *, cache_length: int | None = None, memory_limit: int = 0
) -> GenerationSettings:
    return generation_settings(
        config({**CACHE, **parameters}),
        cache_length=cache_length,
        bytes_per_token=KIB,
        memory_limit=memory_limit,
    )


def completed(text: str = "", *, has_tokenizer: bool = True) -> ModelConfig:
    return generation_model_config(config(CACHE, text), "m", has_tokenizer=has_tokenizer)


def test_a_model_generates_when_its_config_names_a_cache() -> None:
    assert is_generation(config(CACHE))
    assert is_generation(config({"past_names": "past_%d"}))
    assert not is_generation(config({"context_length": "8"}))
    assert not is_generation(config(TWIN))
    assert is_twin(config(TWIN))
    assert twin_of(config(TWIN)) == "gpt"
    assert twin_of(config(CACHE)) == ""


def test_every_limit_has_a_default_but_the_context() -> None:
    assert settings({"context_length": "64"}) == GenerationSettings(
        context_length=64, max_prompt_length=63, default_max_tokens=16, max_num_seqs=16,
        cache_tokens=16 * 64, max_num_batched_tokens=0, max_queue_size=128,
        enable_prefix_caching=True, eos_token_ids=frozenset(),
    )  # fmt: skip


def test_every_limit_can_be_given() -> None:
    given = {
        "context_length": "64", "max_prompt_length": "40", "default_max_tokens": "5", "max_num_seqs": "3",
        "kv_cache_memory_bytes": str(100 * KIB + 7), "max_num_batched_tokens": "32", "max_queue_size": "0",
        "enable_prefix_caching": "False", "eos_token_id": "2, 7",
    }  # fmt: skip
    assert settings(given) == GenerationSettings(
        64, 40, 5, 3, 100, 32, 0, enable_prefix_caching=False, eos_token_ids=frozenset({2, 7})
    )


def test_the_graphs_cache_says_the_context() -> None:
    assert settings({}, cache_length=32).context_length == 32
    assert settings({"context_length": "20"}, cache_length=32).context_length == 20
    with pytest.raises(ModelLoadError, match="'context_length' is '33', expected 32 at most"):
        settings({"context_length": "33"}, cache_length=32)
    with pytest.raises(ModelLoadError, match="'context_length' is missing"):
        settings({})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_num_seqs": "many"}, "'max_num_seqs' is 'many', expected a whole number"),
        ({"max_num_seqs": ""}, "'max_num_seqs' is '', expected a whole number"),
        ({"max_num_seqs": "0"}, "'max_num_seqs' is 0, expected 1 or more"),
        ({"max_num_seqs": "1025"}, "'max_num_seqs' is 1025, expected 1024 at most"),
        ({"max_queue_size": "65537"}, "'max_queue_size' is 65537, expected 65536 at most"),
        ({"max_queue_size": "-1"}, "'max_queue_size' is '-1'"),
        ({"max_queue_size": "9" * 5000}, "'max_queue_size' is '999"),
        ({"default_max_tokens": "0"}, "'default_max_tokens' is 0, expected 1 or more"),
        ({"context_length": "1"}, "'context_length' is 1, expected 2 or more"),
        ({"max_prompt_length": "64"}, "'max_prompt_length' is 64, expected less than context_length, 64"),
        ({"max_prompt_length": "0"}, "'max_prompt_length' is 0, expected 1 or more"),
        ({"enable_prefix_caching": "yes"}, "'enable_prefix_caching' is 'yes', expected true or false"),
        ({"eos_token_id": "2,"}, "'eos_token_id' is '2,', expected a token's id, or several"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>'"),
        ({"kv_cache_memory_bytes": "1GiB"}, "'1GiB', expected bytes as a whole number without a unit"),
        ({"kv_cache_memory_bytes": "65535"}, "is 65535, but one sequence .* 64 tokens, takes 65536 bytes"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        settings({"context_length": "64", **parameters})


def test_a_cache_takes_no_more_than_a_quarter_of_the_memory_or_all_slots_need() -> None:
    one = {"context_length": "64"}
    assert settings(one, memory_limit=4 * 100 * KIB).cache_tokens == 100
    assert settings(one, memory_limit=1 << 40).cache_tokens == 16 * 64
    assert settings({**one, "kv_cache_memory_bytes": str(1 << 40)}).cache_tokens == 16 * 64
    with pytest.raises(ModelLoadError, match=r"takes 65536 bytes, and a quarter of the memory .* is 65535"):
        settings(one, memory_limit=4 * 64 * KIB - 1)


def test_a_generation_model_may_stream_and_another_may_not() -> None:
    decoupled = "model_transaction_policy { decoupled: true }"
    checked(CACHE, decoupled)
    with pytest.raises(ModelLoadError, match="a graph answers each request once"):
        checked({}, decoupled)
    with pytest.raises(ModelLoadError, match="a twin answers each request once; 'gpt' can stream"):
        checked(TWIN, decoupled)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: 4", "max_batch_size is 4, expected 0 .* max_num_seqs says how many"),
        ("dynamic_batching {}", "dynamic_batching .* at every token"),
        ("sequence_batching {}", "sequence_batching .* a text is one request"),
        ("model_warmup { name: 'w' }", "model_warmup can't go with token generation"),
        ("instance_group { count: 2 }", "instance_group.count is 2, expected 1"),
        ("input { name: 'text_input' reshape { shape: 1 } }", "'input.reshape' is not supported"),
        ("output { name: 'text_output' label_filename: 'a' }", "'output.label_filename' is not supported"),
    ],
)
@pytest.mark.parametrize("parameters", [CACHE, TWIN])
def test_what_cannot_go_with_generation_is_refused(
    parameters: dict[str, str], text: str, message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        checked(parameters, text)


def test_only_generation_models_have_optional_inputs() -> None:
    text = 'input { name: "text_input" optional: true }'
    checked(CACHE, text)
    checked(TWIN, text)
    with pytest.raises(ModelLoadError, match=r"'input.optional' is not supported"):
        checked({}, text)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"generation_model": ""}, "'generation_model' is '', expected the name of a generation model"),
        ({**TWIN, "max_num_seqs": "4"}, "'max_num_seqs' can't go with 'generation_model'.* config of 'gpt'"),
        ({**TWIN, **CACHE}, "'past_key_names' can't go with 'generation_model'"),
        ({**CACHE, "max_num_seq": "4"}, "'max_num_seq' is unknown: did you mean 'max_num_seqs'"),
        ({**CACHE, "length_axis": "1"}, "'length_axis' can't go with token generation"),
        ({"past_key_name": "a.%d"}, "did you mean 'past_key_names'"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        checked(parameters)


def test_parameters_of_generation_mean_nothing_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checked({"logits": "somebody's note", "logit": "another"})
        assert {record.getMessage().partition("parameter ")[2] for record in caplog.records} == {
            "'logits' has no effect: the model has none of past_key_names, past_names, generation_model",
            "'logit' has no effect: it is unknown",
        }
        caplog.clear()
        checked({**dict.fromkeys(PARAMETERS[1:], "1"), "intra_op_thread_count": "1"})
        assert not caplog.records


def test_clients_see_text_and_ids() -> None:
    model = completed()
    assert {n: (s.datatype.name, s.shape) for n, s in model.outputs.items()} == {
        "text_output": ("BYTES", (-1,)),
        "output_ids": ("INT64", (-1,)),
        "finish_reason": ("BYTES", (-1,)),
        "num_input_tokens": ("UINT32", (1,)),
        "num_output_tokens": ("UINT32", (-1,)),
    }
    assert (model.inputs["text_input"].datatype.name, model.inputs["text_input"].shape) == ("BYTES", (1,))
    assert model.message.name == "m"
    assert [field.name for field in model.message.input] == list(model.inputs)
    assert all(field.optional for field in model.message.input)
    assert [field.data_type for field in model.message.output] == [
        pb.TYPE_STRING, pb.TYPE_INT64, pb.TYPE_STRING, pb.TYPE_UINT32, pb.TYPE_UINT32,
    ]  # fmt: skip


def test_without_a_tokenizer_clients_see_ids_only() -> None:
    model = completed(has_tokenizer=False)
    assert not {"text_input", "stop", "stop_words"} & set(model.inputs)
    assert "text_output" not in model.outputs
    assert [field.name for field in model.message.input if not field.optional] == ["input_ids"]


def test_a_config_may_list_some_of_the_tensors_itself() -> None:
    model = completed(
        'input { name: "text_input" data_type: TYPE_STRING dims: 1 }'
        'input { name: "stream" data_type: TYPE_BOOL dims: 1 optional: true }'
        'output { name: "text_output" data_type: TYPE_STRING dims: -1 }'
    )
    names = [field.name for field in model.message.input]
    assert names[:2] == ["text_input", "stream"]
    assert sorted(names) == sorted(model.inputs)
    assert {tuple(field.dims) for field in model.message.input} == {(1,), (-1,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input { name: "image" }', r"has no input 'image', it has \['text_input', 'input_ids'"),
        ('output { name: "logprobs" }', "has no output 'logprobs'"),
        ('input { name: "top_k" data_type: TYPE_FP32 }', "'top_k' is TYPE_FP32, expected TYPE_INT32"),
        ('input { name: "top_k" dims: [2, 3] }', r"dims \[2, 3\], expected \[1\]"),
        ('input { name: "top_k" } input { name: "top_k" }', "'top_k' is there twice"),
    ],
)
def test_tensors_that_a_generation_model_does_not_have_are_refused(text: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        completed(text)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="tensors of text need a tokenizer beside the graph"):
        completed('input { name: "text_input" }', has_tokenizer=False)
