"""What `onnxedge generate` sends, to models of ours and to those of other Triton backends."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serve.generate.tensors import input_specs, output_specs
from serve.generate_client.command import make_question, parse, read_prompt
from serve.generate_client.messages import (
    GenerateError,
    Question,
    is_generation_model,
    make_request,
    read_answer,
)
from serve.pb import grpc_service_pb2 as pb
from serve.protocol.datatypes import DATATYPES
from serve.protocol.tensor_codec import decode_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

Specs = dict[str, tuple[str, list[int]]]

VLLM: Specs = {
    "text_input": ("BYTES", [1]),
    "stream": ("BOOL", [1]),
    "sampling_parameters": ("BYTES", [1]),
    "exclude_input_in_output": ("BOOL", [1]),
    "return_finish_reason": ("BOOL", [1]),
    "return_num_output_tokens": ("BOOL", [1]),
}
TENSORRT_LLM: Specs = {
    "text_input": ("BYTES", [-1, 1]),
    "max_tokens": ("INT32", [-1, 1]),
    "temperature": ("FP32", [-1, 1]),
    "top_p": ("FP32", [-1, 1]),
    "stop": ("BOOL", [-1, 1]),
    "stop_words": ("BYTES", [-1, -1]),
    "random_seed": ("UINT64", [-1, 1]),
    "stream": ("BOOL", [-1, 1]),
}


def metadata(inputs: Specs, *outputs: str) -> pb.ModelMetadataResponse:
    message = pb.ModelMetadataResponse(name="net")
    for name, (datatype, shape) in inputs.items():
        message.inputs.add(name=name, datatype=datatype, shape=shape)
    for name in outputs:
        message.outputs.add(name=name, datatype="BYTES", shape=[-1])
    return message


def ours(*, has_tokenizer: bool = True) -> pb.ModelMetadataResponse:
    specs = input_specs(has_tokenizer=has_tokenizer).values()
    return metadata(
        {spec.name: (spec.datatype.name, list(spec.shape)) for spec in specs},
        *output_specs(has_tokenizer=has_tokenizer),
    )


def question(*words: str, context: str = "") -> Question:
    options = parse(["net", *words])
    return make_question(options, read_prompt(options), context)


def sent(request: pb.ModelInferRequest) -> dict[str, tuple[list[int], list[Any]]]:
    """Name to shape and elements."""
    found = {}
    for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True):
        array = decode_tensor(tensor.name, DATATYPES[tensor.datatype], tuple(tensor.shape), data)
        found[tensor.name] = (list(tensor.shape), array.reshape(-1).tolist())
    return found


def names(tensors: Iterable[Any]) -> list[str]:
    return [tensor.name for tensor in tensors]


def test_a_model_of_ours_gets_a_tensor_for_each_flag() -> None:
    flags = "--max-tokens 9 --temperature 0 --top-k 3 --top-p .5 --repetition-penalty 1.5"
    more = ("--seed", str(2**64 - 1), "--stop", "\n", "--stop", "end", "--stats")
    asked = question("Über", *flags.split(), *more)
    request = make_request(ours(), asked, stream=True)
    assert sent(request) == {
        "text_input": ([1], ["Über".encode()]),
        "max_tokens": ([1], [9]),
        "temperature": ([1], [0.0]),
        "top_k": ([1], [3]),
        "top_p": ([1], [0.5]),
        "repetition_penalty": ([1], [1.5]),
        "seed": ([1], [2**64 - 1]),
        "stop": ([2], [b"\n", b"end"]),
        "stream": ([1], [True]),
        "exclude_input_in_output": ([1], [True]),
        "return_finish_reason": ([1], [True]),
        "return_num_input_tokens": ([1], [True]),
        "return_num_output_tokens": ([1], [True]),
    }
    assert names(request.outputs) == ["text_output", "num_input_tokens", "num_output_tokens", "finish_reason"]


def test_what_is_not_asked_for_is_left_to_the_server_but_for_three_defaults() -> None:
    request = make_request(ours(), question("a"), stream=False)
    values = sent(request)
    assert set(values) == {"text_input", "max_tokens", "temperature", "top_p", "exclude_input_in_output"}
    assert values["max_tokens"] == ([1], [128])
    assert values["temperature"][1] == pytest.approx([0.8])
    assert values["top_p"][1] == pytest.approx([0.95])
    assert names(request.outputs) == ["text_output"]


def test_token_ids_go_in_and_out_instead_of_text() -> None:
    for model in (ours(), ours(has_tokenizer=False)):
        request = make_request(model, question("--ids", "18, 47 56"), stream=True)
        assert sent(request)["input_ids"] == ([3], [18, 47, 56])
        assert names(request.outputs) == ["output_ids"]


def test_vllm_gets_the_sampling_parameters_as_json() -> None:
    asked = question("a", "--top-k", "5", "--stop", "x", "--seed", "3", "--stats")
    request = make_request(metadata(VLLM, "text_output", "finish_reason"), asked, stream=True)
    values = sent(request)
    ((text,),) = (values.pop("sampling_parameters")[1],)
    assert json.loads(text) == {
        "max_tokens": 128, "temperature": 0.8, "top_p": 0.95, "top_k": 5, "stop": ["x"], "seed": 3,
    }  # fmt: skip
    assert set(values) == set(VLLM) - {"sampling_parameters"}
    assert names(request.outputs) == ["text_output", "finish_reason"]


def test_tensorrt_llm_gets_its_own_names_and_shapes() -> None:
    asked = question("a", "--stop", "x", "--stop", "y", "--seed", "3")
    values = sent(make_request(metadata(TENSORRT_LLM, "text_output"), asked, stream=True))
    assert values["text_input"] == ([1, 1], [b"a"])
    assert values["stop_words"] == ([1, 2], [b"x", b"y"])
    assert values["random_seed"] == ([1, 1], [3])
    assert "stop" not in values


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (metadata(TENSORRT_LLM, "text_output"), ["a", "--top-k", "3"], "no input 'top_k': leave --top-k out"),
        (metadata(VLLM, "text_output"), ["1", "--ids"], "model 'net' takes text alone: leave --ids out"),
        (
            ours(has_tokenizer=False),
            ["a"],
            "has no tokenizer and takes token ids alone: use --ids",
        ),
        (ours(), [""], "the prompt is empty"),
        (ours(), ["--ids", " "], "the prompt is empty"),
        (
            ours(),
            ["a", "--max-tokens", "3000000000"],
            "'max_tokens' is 3000000000, expected",
        ),
        (ours(), ["a", "--seed", "-1"], r"'seed' is -1, expected 0 to \d+ \(UINT64\)"),
        (ours(), ["--ids", "9" * 30], r"'input_ids' is 9+, expected"),
        (ours(), ["--ids", "ROMEO"], "with --ids the prompt is token ids, such as '18 47 56'"),
        (ours(), ["\udcff"], "the prompt is not UTF-8: invalid start byte at byte 0"),
        (ours(), ["\ud800"], "the prompt is not UTF-8"),
        (ours(), ["a", "--stop", "\udcff"], "--stop is not UTF-8"),
    ],
)
def test_what_cannot_be_asked_is_said(
    model: pb.ModelMetadataResponse, words: list[str], message: str
) -> None:
    with pytest.raises(GenerateError, match=message):
        make_request(model, question(*words), stream=True)


def test_arguments_that_the_locale_cannot_decode_are_utf_8() -> None:
    words = [os.fsdecode(b"Gr\xc3\xbc\xc3\x9fe"), "--stop", "f\udcc3\udcbcr"]
    values = sent(make_request(ours(), question(*words), stream=True))
    assert (values["text_input"][1], values["stop"][1]) == (["Grüße".encode()], ["für".encode()])


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf", "1e10"])
def test_a_timeout_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["net", "a", f"--timeout={seconds}"])
    assert "--timeout: expected above 0 and up to 1e+09, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "context", "expected"),
    [
        (["ROMEO:"], "", 128),
        (["ROMEO:"], "1024", 128),
        (["ROMEO:"], "64", 58),
        (["é"], "64", 62),  # a token a byte, at worst
        (["a" * 100], "64", 1),  # the server will say it
        (["a" * 200], "256", 128),  # some fifty tokens, mostly
        (["1 2 3", "--ids"], "100", 97),
        (["ROMEO:", "--max-tokens", "500"], "64", 500),
    ],
)
def test_a_short_context_is_filled(words: list[str], context: str, expected: int) -> None:
    assert question(*words, context=context).sampling["max_tokens"] == expected


def test_only_what_goes_on_with_a_prompt_is_a_generation_model() -> None:
    ids: Specs = {"input_ids": ("INT64", [-1, -1])}
    assert is_generation_model(ours())
    assert is_generation_model(ours(has_tokenizer=False))
    assert is_generation_model(metadata(VLLM, "text_output"))
    assert not is_generation_model(metadata(ids, "logits"))
    assert not is_generation_model(metadata({"image": ("UINT8", [-1])}, "text_output"))


def test_both_forms_of_contents_are_read() -> None:
    response = pb.ModelInferResponse()
    tensor = response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append("é".encode())
    tensor = response.outputs.add(name="num_output_tokens", datatype="UINT32", shape=[1])
    tensor.contents.uint_contents.append(2)
    answer = read_answer(response)
    assert (answer.text, answer.ids, answer.output_tokens) == ("é".encode(), (), 2)
    raw = pb.ModelInferResponse(raw_output_contents=[np.array([7, 8], np.int64).tobytes()])
    raw.outputs.add(name="output_ids", datatype="INT64", shape=[2])
    assert read_answer(raw).ids == (7, 8)
    assert read_answer(pb.ModelInferResponse()).text == b""
