"""A generation model's messages as a client writes and reads them, whichever Triton server it asks.

What a model can be told is what its metadata lists: TensorRT-LLM's models on Triton have a tensor for each
sampling parameter, vLLM's one tensor with all of them as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.pb import grpc_service_pb2 as pb
from serve.protocol.datatypes import DATATYPES
from serve.protocol.tensor_codec import decode_contents, decode_tensor, encode_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# A sampling parameter's tensor where it isn't called as the parameter is.
_OTHER_NAMES = {"seed": "random_seed", "stop": "stop_words"}
_AS_JSON = "sampling_parameters"
_COUNTS = ("num_input_tokens", "num_output_tokens", "finish_reason")


class GenerateError(Exception):
    """The model can't be asked this, or failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the model.

    Attributes:
        prompt: a text, or token ids.
        sampling: vLLM's name of each sampling parameter to its value.
        required: those that the model must not ignore.
        counts: whether to answer how many tokens there were, and why there are no more.
    """

    prompt: str | Sequence[int]
    sampling: Mapping[str, Any]
    required: frozenset[str] = frozenset()
    counts: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, which holds a part of the text or all of it.

    Attributes:
        text: UTF-8, in which a character may be torn.
        ids: of the tokens.
        input_tokens: the prompt's number of tokens; None: the model doesn't say.
        output_tokens: how many tokens this response stands for; None: the model doesn't say.
        finish_reason: why there are no more; empty: there may be.
    """

    text: bytes = b""
    ids: tuple[int, ...] = ()
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str = ""


def is_generation_model(metadata: pb.ModelMetadataResponse) -> bool:
    """Whether a model takes a prompt, as text or as ids, and answers with more of the same."""
    inputs = {tensor.name for tensor in metadata.inputs}
    outputs = {tensor.name for tensor in metadata.outputs}
    texts = "text_input" in inputs and "text_output" in outputs
    return texts or ("input_ids" in inputs and "output_ids" in outputs)


def make_request(
    metadata: pb.ModelMetadataResponse, question: Question, *, stream: bool
) -> pb.ModelInferRequest:
    """A request with those tensors that the model has.

    Args:
        metadata: of a generation model.
        question: what is asked.
        stream: whether the text is to be answered piece by piece.

    Raises:
        GenerateError: the model takes no such prompt, has no such parameter, or a value is out of range.
    """
    inputs = {tensor.name: tensor for tensor in metadata.inputs}
    text = isinstance(question.prompt, str)
    values = {
        "text_input" if text else "input_ids": _prompt(metadata.name, inputs, question.prompt),
        **_sampling(metadata.name, inputs, question),
    }
    switches = ["exclude_input_in_output", *(["stream"] if stream else [])]
    answered = ["text_output" if text else "output_ids"]
    if question.counts:
        switches += [f"return_{name}" for name in _COUNTS]
        answered += [name for name in _COUNTS if name in {tensor.name for tensor in metadata.outputs}]
    values |= {name: [True] for name in switches if name in inputs}
    request = pb.ModelInferRequest(model_name=metadata.name)
    for name, elements in values.items():
        _add(request, inputs[name], elements)
    for name in answered:
        request.outputs.add(name=name)
    return request


def _prompt(model: str, inputs: Mapping[str, Any], prompt: str | Sequence[int]) -> Sequence[Any]:
    if not prompt:
        raise GenerateError("the prompt is empty")
    if isinstance(prompt, str):
        if "text_input" not in inputs:
            raise GenerateError(f"model '{model}' has no tokenizer and takes token ids alone: use --ids")
        try:
            return [prompt.encode()]
        except UnicodeEncodeError as error:
            raise GenerateError("the prompt is not UTF-8") from error
    if "input_ids" not in inputs:
        raise GenerateError(f"model '{model}' takes text alone: leave --ids out")
    return prompt


def _sampling(model: str, inputs: Mapping[str, Any], question: Question) -> dict[str, Sequence[Any]]:
    """The sampling parameters by their tensors; those without one as JSON, where the model takes that."""
    values: dict[str, Sequence[Any]] = {}
    rest: dict[str, Any] = {}
    for name, value in question.sampling.items():
        names = (name, _OTHER_NAMES.get(name, name))
        found = next((tensor for tensor in names if _takes(inputs.get(tensor), value)), None)
        if found:
            values[found] = [text.encode() for text in value] if isinstance(value, list) else [value]
        else:
            rest[name] = value
    if rest and _AS_JSON in inputs:
        values[_AS_JSON] = [json.dumps(rest).encode()]
    elif ignored := sorted(question.required & rest.keys()):
        flag = ignored[0].replace("_", "-")
        raise GenerateError(f"model '{model}' has no input '{ignored[0]}': leave --{flag} out")
    return values


def _takes(spec: Any, value: Any) -> bool:
    """Whether a tensor is there, and meant for this: TensorRT-LLM's `stop` is no text but a switch."""
    return spec is not None and (spec.datatype == "BYTES") == isinstance(value, list)


def _add(request: pb.ModelInferRequest, spec: Any, elements: Sequence[Any]) -> None:
    """Add a tensor whose last axis has the elements, the others being one of something."""
    datatype = DATATYPES[spec.datatype]
    if datatype.dtype.kind in "iu":
        limits = np.iinfo(datatype.dtype)
        for element in elements:
            if not limits.min <= element <= limits.max:
                raise GenerateError(
                    f"'{spec.name}' is {element}, expected {limits.min} to {limits.max} ({datatype.name})"
                )
    array = np.array(elements, datatype.dtype)
    request.inputs.add(
        name=spec.name,
        datatype=datatype.name,
        shape=[1] * (len(spec.shape) - 1) + [len(elements)],
    )
    request.raw_input_contents.append(bytes(encode_tensor(datatype, array)))


def read_answer(response: pb.ModelInferResponse) -> Answer:
    """The tensors of a response that this client asks for.

    Raises:
        InvalidArgumentError: a tensor's bytes don't fit its shape.
    """
    found = dict(_tensors(response))
    texts, ids = found.get("text_output", ()), found.get("output_ids", ())
    read, written = found.get("num_input_tokens"), found.get("num_output_tokens")
    reasons = [reason.decode(errors="replace") for reason in found.get("finish_reason", ())]
    return Answer(
        text=b"".join(texts),
        ids=tuple(int(token) for token in ids),
        input_tokens=None if read is None else int(read.sum()),
        output_tokens=None if written is None else int(written.sum()),
        finish_reason=reasons[-1] if reasons else "",
    )


def _tensors(response: pb.ModelInferResponse) -> Iterator[tuple[str, np.ndarray]]:
    """Each output's name and elements, whichever of the protocol's two ways they come in."""
    for index, output in enumerate(response.outputs):
        datatype, shape = DATATYPES[output.datatype], tuple(output.shape)
        if response.raw_output_contents:
            raw = response.raw_output_contents[index]
            yield output.name, decode_tensor(output.name, datatype, shape, raw).reshape(-1)
        else:
            yield output.name, decode_contents(output.name, datatype, shape, output.contents).reshape(-1)
