"""What a request asks to be generated: from inputs, JSON and parameters, refused before work starts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from serve.errors import InvalidArgumentError, UnsupportedError
from serve.generate.request_fields import GenerationRequest, RequestReader
from serve.generate.sampling import SamplingParameters
from serve.generate.settings import GenerationSettings
from serve.generate.tokenizer import Tokenizer
from serve.protocol.datatypes import DATATYPES
from serve.request import InferRequest, RequestedOutput, SharedArea, Tensor
from tests.serve.generate.byte_tokenizer import write_byte_tokenizer

SETTINGS = GenerationSettings(context_length=32, max_prompt_length=20, default_max_tokens=8)
VOCABULARY = 300
IDS_ONLY = RequestReader("m", SETTINGS, VOCABULARY, None, streams=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer) -> RequestReader:
    return RequestReader("m", SETTINGS, VOCABULARY, tokenizer, streams=True)


def tensor(name: str, value: Any, datatype: str, shape: tuple[int, ...] = (-1,)) -> Tensor:
    kind = DATATYPES[datatype]
    return Tensor(name, kind, np.array(value, kind.dtype).reshape(shape))


def text(value: str | bytes, name: str = "text_input") -> Tensor:
    return tensor(name, [value.encode() if isinstance(value, str) else value], "BYTES")


def sampling_json(**values: Any) -> Tensor:
    return text(json.dumps(values), "sampling_parameters")


def ids(*values: int) -> Tensor:
    return tensor("input_ids", values, "INT64")


def request(*inputs: Tensor, outputs: tuple[RequestedOutput, ...] = (), **parameters: Any) -> InferRequest:
    return InferRequest("m", "", inputs, outputs, parameters=parameters)


def read(reader: RequestReader, *inputs: Tensor, **parameters: Any) -> GenerationRequest:
    return reader.read(request(*inputs, **parameters))


def test_a_prompt_is_enough(reader: RequestReader) -> None:
    assert read(reader, text("abc")) == GenerationRequest(
        prompt_ids=reader.tokenizer.encode("abc") if reader.tokenizer else [],
        prompt_text="abc", max_tokens=8, sampling=SamplingParameters(), stops=(), include_stop=False,
        stream=False, ignore_eos=False, exclude_input_in_output=False, outputs=("text_output",),
    )  # fmt: skip


@pytest.mark.parametrize("datatype", ["INT64", "INT32", "UINT8"])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_ids_come_in_any_integer(shape: tuple[int, ...], datatype: str) -> None:
    found = read(IDS_ONLY, tensor("input_ids", [1, 2, 3], datatype, shape))
    assert (found.prompt_ids, found.prompt_text, found.outputs) == ([1, 2, 3], None, ("output_ids",))
    assert found.exclude_input_in_output
    assert all(type(i) is int for i in found.prompt_ids)


ALL = {
    "max_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.25, "min_p": 0.125,
    "repetition_penalty": 1.5, "presence_penalty": 0.75, "frequency_penalty": -0.5, "seed": 9,
    "min_tokens": 2, "ignore_eos": True,
}  # fmt: skip
SAMPLING = SamplingParameters(
    temperature=0.5, top_k=4, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=0.75,
    frequency_penalty=-0.5, seed=9, min_tokens=2,
)  # fmt: skip
DATATYPE_OF = {int: "INT32", float: "FP32", bool: "BOOL"}


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("source", ["parameters", "json", "json parameter", "inputs"])
def test_fields_come_from_three_places(reader: RequestReader, source: str, *, spelled: bool) -> None:
    values = {name: str(value) if spelled else value for name, value in ALL.items()}
    if source == "parameters":
        found = read(reader, text("a"), **values, stop="x")
    elif source == "json":
        found = read(reader, text("a"), sampling_json(**values, stop=["x"]))
    elif source == "json parameter":
        found = read(reader, text("a"), sampling_parameters=json.dumps({**values, "stop": ["x"]}))
    else:
        scalars = [tensor(name, [value], DATATYPE_OF[type(value)]) for name, value in ALL.items()]
        found = read(reader, text("a"), *scalars, text("x", "stop"))
    assert found.sampling == SAMPLING
    assert (found.max_tokens, found.ignore_eos, found.stops) == (3, True, ("x",))
    assert not found.include_stop


def test_the_stop_text_may_be_asked_for(reader: RequestReader) -> None:
    assert read(reader, text("a"), sampling_json(stop="\ud800", include_stop_str_in_output=True)).include_stop


def test_an_input_outdoes_the_json_and_that_a_parameter(reader: RequestReader) -> None:
    found = read(
        reader, text("a"), sampling_json(max_tokens=2, top_k=2, seed=None),
        tensor("max_tokens", [3], "INT32"), max_tokens=1, top_k=1, seed=1,
    )  # fmt: skip
    assert (found.max_tokens, found.sampling.top_k, found.sampling.seed) == (3, 2, 1)


def test_json_outdoes_a_parameter_also_as_one_and_that_in_an_input_outdoes_both(
    reader: RequestReader,
) -> None:
    in_parameter = json.dumps({"max_tokens": 2, "top_k": 2, "seed": None})
    fields = {"sampling_parameters": in_parameter, "max_tokens": 1, "top_k": 1, "seed": 1}
    found = read(reader, text("a"), sampling_json(top_k=3), **fields)
    assert (found.max_tokens, found.sampling.top_k, found.sampling.seed) == (2, 3, 1)


@pytest.mark.parametrize("datatype", ["INT8", "INT16", "INT64", "UINT8", "UINT32", "UINT64"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_whole_numbers_come_in_any_integer(datatype: str, shape: tuple[int, ...]) -> None:
    assert read(IDS_ONLY, ids(1), tensor("max_tokens", 5, datatype, shape)).max_tokens == 5


@pytest.mark.parametrize("datatype", ["FP16", "FP64", "INT32"])
def test_numbers_come_in_any_datatype_of_numbers(datatype: str) -> None:
    found = read(IDS_ONLY, ids(1), tensor("repetition_penalty", [2], datatype))
    assert found.sampling.repetition_penalty == 2.0


def test_other_names_of_fields(reader: RequestReader) -> None:
    seed = tensor("random_seed", [2**64 - 1], "UINT64")
    stops = tensor("stop_words", [b"\xc3\xa4", b"\n\n"], "BYTES", (1, 2))
    found = read(reader, text("a"), seed, stops)
    assert found.sampling.seed == 2**64 - 1
    assert found.stops == ("ä", "\n\n")


def test_default_max_tokens_are_cut_to_the_room_that_is_left() -> None:
    tight = GenerationSettings(context_length=10, max_prompt_length=9)
    reader = RequestReader("m", tight, VOCABULARY, None, streams=True)
    assert read(reader, ids(*range(7))).max_tokens == 3


def test_the_prompt_is_part_of_the_text_unless_it_streams(reader: RequestReader) -> None:
    exclude = tensor("exclude_input_in_output", [True], "BOOL")
    include = tensor("exclude_input_in_output", [False], "BOOL")
    stream = tensor("stream", [True], "BOOL")
    assert not read(reader, text("a"), include).exclude_input_in_output
    assert read(reader, text("a"), exclude).exclude_input_in_output
    assert read(reader, text("a"), stream).exclude_input_in_output
    assert read(reader, text("a"), stream, exclude).exclude_input_in_output
    with pytest.raises(InvalidArgumentError, match="when streaming, 'exclude_input_in_output' = false"):
        read(reader, text("a"), stream, include)
    with pytest.raises(InvalidArgumentError, match="needs the prompt in 'text_input'"):
        read(reader, ids(1), include)


def test_answers_in_parts_need_a_model_that_gives_them(tokenizer: Tokenizer) -> None:
    once = RequestReader("once", SETTINGS, VOCABULARY, tokenizer, streams=False)
    assert not read(once, text("a"), stream=False).stream
    with pytest.raises(InvalidArgumentError, match="'once' answers each request once"):
        read(once, text("a"), stream=True)


def test_outputs_are_the_prompts_kind_and_what_flags_ask_or_those_that_are_named(
    reader: RequestReader,
) -> None:
    counts = tensor("return_num_output_tokens", [True], "BOOL")
    found = read(reader, ids(1), counts, return_finish_reason=True, return_num_input_tokens=False)
    assert found.outputs == ("output_ids", "finish_reason", "num_output_tokens")
    named = tuple(map(RequestedOutput, ("num_input_tokens", "text_output", "text_output")))
    assert reader.read(request(ids(1), counts, outputs=named)).outputs == ("text_output", "num_input_tokens")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (RequestedOutput("logprobs"), r"unexpected inference output 'logprobs' .* it has \['text_output'"),
        (RequestedOutput("text_output", classification=2), "classification needs a class score"),
    ],
)
def test_outputs_that_cannot_be_are_refused(
    reader: RequestReader, output: RequestedOutput, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        reader.read(request(text("a"), outputs=(output,)))


def test_outputs_in_shared_memory_are_not_supported(reader: RequestReader) -> None:
    output = RequestedOutput("text_output", shared_memory=SharedArea("r", 0, 64))
    with pytest.raises(UnsupportedError, match="has no size to reserve shared memory for"):
        reader.read(request(text("a"), outputs=(output,)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "expects its prompt in either text_input or input_ids, got"),
        ((text("a"), ids(1)), "expects its prompt in either text_input or input_ids, got"),
        ((text("a"), text("b")), "expects each input once"),
        (
            (text("a"), text("b", "image")),
            r"unexpected inference input 'image' .* \['text_input', 'input_ids'",
        ),
        ((tensor("text_input", [b"a", b"b"], "BYTES"),), r"'text_input': expected one element, shape \[1\]"),
        ((tensor("text_input", [1], "INT32"),), "'text_input': expected datatype BYTES, got INT32"),
        ((text(b"\xff"),), "'text_input': expected UTF-8"),
        ((text(""),), "the prompt is empty"),
        ((ids(),), "the prompt is empty"),
        ((text("x" * 21),), r"has 21 tokens, expected 20 at most \(max_prompt_length\): shorten it"),
        ((ids(*range(21)),), r"has 21 tokens, expected 20 at most \(max_prompt_length\): shorten it"),
        ((ids(1, 300),), r"'input_ids': token 1 is 300, expected 0 to 299"),
        ((ids(-1),), "token 0 is -1, expected 0 to 299"),
        ((tensor("input_ids", [1.0], "FP32"),), "'input_ids': expected datatype INT8 or .*, got FP32"),
        ((tensor("input_ids", [1, 2], "INT64", (2, 1)),), "for one prompt a request, got"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(
    reader: RequestReader, inputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read(reader, *inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "'max_tokens' is 0, expected 1 or more"),
        ({"max_tokens": 31}, r"2 tokens and 'max_tokens' is 31, together 33, expected 32 .* ask for 30"),
        ({"max_tokens": 2**63}, "together"),
        ({"max_tokens": 2.5}, "'max_tokens': expected a whole number, got '2.5'"),
        ({"max_tokens": "x"}, "'max_tokens': expected a whole number, got 'x'"),
        ({"max_tokens": "1_0"}, "'max_tokens': expected a whole number, got '1_0'"),
        ({"max_tokens": "٣"}, "'max_tokens': expected a whole number, got '٣'"),
        ({"max_tokens": " 3"}, "'max_tokens': expected a whole number, got ' 3'"),
        ({"seed": "++1"}, "'seed': expected a whole number"),
        ({"temperature": "1_0"}, "'temperature': expected a number, got '1_0'"),
        ({"temperature": "٣"}, "'temperature': expected a number, got '٣'"),
        ({"max_tokens": "9" * 5000}, "'max_tokens': expected a whole number"),
        ({"max_tokens": True}, "'max_tokens': expected a whole number, got 'True'"),
        ({"max_tokens": float("inf")}, "'max_tokens': expected a whole number, got 'inf'"),
        ({"temperature": "warm"}, "'temperature': expected a number, got 'warm'"),
        ({"temperature": True}, "'temperature': expected a number, got 'True'"),
        ({"temperature": float("nan")}, "'temperature': expected a finite number, got 'nan'"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -2}, "seed"),
        ({"min_tokens": 9}, "'min_tokens' is 9, expected 8 at most, as 'max_tokens'"),
        ({"ignore_eos": "maybe"}, "'ignore_eos': expected true or false, got 'maybe'"),
        ({"stop": ""}, "'stop': expected texts of 1 to 1024 bytes, got one of 0"),
        ({"stop": "x" * 1025}, "'stop': expected texts of 1 to 1024 bytes, got one of 1025"),
        ({"seed": 1, "random_seed": 2}, "'seed' and 'random_seed' are the same, give one of them"),
        ({"n": 2}, "'n' is not supported by this server: leave it out"),
        ({"best_of": "2"}, "'best_of' is not supported"),
        ({"logprobs": 0}, "'logprobs' is not supported"),
        ({"skip_special_tokens": False}, "'skip_special_tokens' is not supported"),
    ],
)
@pytest.mark.parametrize("source", ["parameters", "json"])
def test_fields_that_cannot_be_are_refused(
    reader: RequestReader, source: str, fields: dict[str, Any], message: str
) -> None:
    inputs = (sampling_json(**fields),) if source == "json" else ()
    with pytest.raises(InvalidArgumentError, match=message):
        read(reader, text("ab"), *inputs, **({} if inputs else fields))


@pytest.mark.parametrize("value", ["-5", -5, -5.0])
def test_whoever_asks_for_less_than_a_token_is_told_where(reader: RequestReader, value: Any) -> None:
    for source, inputs, parameters in (
        ("request parameter", (), {"max_tokens": value}),
        ("sampling_parameters", (sampling_json(max_tokens=value),), {}),
        ("sampling_parameters", (), {"sampling_parameters": json.dumps({"max_tokens": value})}),
        ("input", (tensor("max_tokens", [int(value)], "INT32"),), {}),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^{source} 'max_tokens' is -5, expected 1 or more"):
            read(reader, text("a"), *inputs, **parameters)


def test_a_sign_and_leading_zeros_may_be_written(reader: RequestReader) -> None:
    found = read(reader, text("a"), max_tokens="+03", seed="-1", temperature="+.5e0")
    assert (found.max_tokens, found.sampling.seed, found.sampling.temperature) == (3, -1, 0.5)


@pytest.mark.parametrize(
    ("json_text", "message"),
    [
        ("{", "'sampling_parameters': expected JSON"),
        ("[" * 20000, "'sampling_parameters': expected JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "'sampling_parameters': expected JSON"),
        ("[1]", "'sampling_parameters': expected a JSON object"),
        (" " * 70000, "expected 65536 characters at most, got 70000"),
        ('{"temprature": 1}', r"unknown key 'temprature', expected some of \['max_tokens'"),
        ('{"\\ud800": 1}', r"unknown key '\\ud800'"),
        ('{"stream": true}', "unknown key 'stream'"),
        ('{"stop": 5}', "'stop': expected a text or a list of texts, got '5'"),
        ('{"stop": ["a", 5]}', "'stop': expected a text or a list of texts"),
        ('{"stop": ' + json.dumps(["a"] * 65) + "}", "'stop': expected 64 texts at most, got 65"),
        ('{"stop_token_ids": [1]}', "'stop_token_ids' is not supported"),
    ],
)
def test_sampling_parameters_that_cannot_be_are_refused(
    reader: RequestReader, json_text: str, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as refused:
        read(reader, text("a"), text(json_text, "sampling_parameters"))
    str(refused.value).encode()  # goes into a header
    with pytest.raises(InvalidArgumentError, match=message):
        read(reader, text("a"), sampling_parameters=json_text)


@pytest.mark.parametrize("value", [5, 0.5, True])
def test_sampling_parameters_as_a_parameter_are_text(reader: RequestReader, value: Any) -> None:
    message = f"request parameter 'sampling_parameters': expected JSON in a text, got '{value}'"
    with pytest.raises(InvalidArgumentError, match=message):
        read(reader, text("a"), sampling_parameters=value)


def test_what_asks_for_nothing_is_accepted(reader: RequestReader) -> None:
    plain = read(reader, text("a"))
    neutral = {
        "n": "1", "best_of": 1, "logprobs": None, "stop_token_ids": [], "logit_bias": {},
        "length_penalty": 1, "early_stopping": "false", "skip_special_tokens": True, "lora_name": "",
    }  # fmt: skip
    assert read(reader, text("a"), sampling_json(**neutral)) == plain
    assert read(reader, text("a"), text("", "sampling_parameters")) == plain
    assert read(reader, text("a"), sampling_parameters=" ") == plain
    assert read(reader, text("a"), sequence_id=5, timeout=3, somebodys_own="x") == plain


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (tensor("max_tokens", [1.0], "FP32"), "'max_tokens': expected datatype INT8 or"),
        (tensor("temperature", [1], "BF16"), "'temperature': expected datatype FP16 or"),
        (tensor("stream", [1], "INT32"), "'stream': expected datatype BOOL, got INT32"),
        (tensor("stop", [[b"a"], [b"b"]], "BYTES", (2, 1)), "'stop': expected shape"),
        (tensor("stop", [b"\xff"], "BYTES"), "'stop': expected UTF-8"),
        (tensor("top_k", [1, 2], "INT32"), r"'top_k': expected one element, shape \[1\], got shape \[2\]"),
        (tensor("top_k", [], "INT32"), r"'top_k': expected one element, shape \[1\], got shape \[0\]"),
        (tensor("seed", [-2], "INT64"), "seed"),
    ],
)
def test_inputs_that_cannot_be_are_refused(reader: RequestReader, field: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read(reader, text("a"), field)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((text("a"),), "unexpected inference input 'text_input' .* it has no tokenizer"),
        ((tensor("max_tokens", [1], "INT32"),), "expects its prompt in input_ids, .* it has no tokenizer"),
    ],
)
def test_text_needs_a_tokenizer(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read(IDS_ONLY, *inputs)
    with pytest.raises(InvalidArgumentError, match="'stop' is a text: it has no tokenizer"):
        read(IDS_ONLY, ids(1), sampling_json(stop="x"))
    with pytest.raises(InvalidArgumentError, match="unexpected inference output 'text_output'"):
        IDS_ONLY.read(request(ids(1), outputs=(RequestedOutput("text_output"),)))


def test_a_huge_text_is_refused_unread(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Tokenizer, "encode")
    reader = RequestReader("m", SETTINGS, VOCABULARY, tokenizer, streams=True)
    with pytest.raises(InvalidArgumentError, match=r"has \d{5,} tokens or more .*expected 20 at most"):
        read(reader, text("ä" * 500_000))


def test_a_tokenizer_of_another_graph_is_noticed(tokenizer: Tokenizer) -> None:
    small = RequestReader("m", SETTINGS, 2, tokenizer, streams=True)
    with pytest.raises(InvalidArgumentError, match="vocabulary of 2: the two don't belong together"):
        read(small, text("z"))
