"""What a request asks to be generated: its inputs and parameters, checked, before any work starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.errors import InvalidArgumentError, UnsupportedError
from serve.generate.field_values import one_text, token_ids, values_of
from serve.generate.sampling import SamplingParameters
from serve.generate.tensors import (
    FINISH_REASON,
    INPUT_IDS,
    NUM_INPUT_TOKENS,
    NUM_OUTPUT_TOKENS,
    OUTPUT_IDS,
    TEXT_INPUT,
    TEXT_OUTPUT,
    input_specs,
    output_specs,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve.generate.settings import GenerationSettings
    from serve.generate.tokenizer import Tokenizer
    from serve.request import InferRequest, Tensor

_SAMPLING_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "min_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate, and how to answer.

    Attributes:
        prompt_ids: the prompt's tokens, at least 1.
        prompt_text: the prompt as it came; None: it came as ids.
        max_tokens: how many may be generated, at least 1; with the prompt at most context_length.
        sampling: how each is chosen.
        stops: texts that end the generation.
        include_stop: whether the one that did is part of the text.
        stream: whether each token is answered as it comes, not all together.
        ignore_eos: whether tokens that end a text don't.
        exclude_input_in_output: whether `text_output` begins behind the prompt, not with it.
        outputs: names of the outputs to answer, in their order.
    """

    prompt_ids: list[int]
    prompt_text: str | None
    max_tokens: int
    sampling: SamplingParameters
    stops: tuple[str, ...]
    include_stop: bool
    stream: bool
    ignore_eos: bool
    exclude_input_in_output: bool
    outputs: tuple[str, ...]


LONGEST_ID = 4096


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Reads the requests of one model.

    Attributes:
        model: the model's name, for messages.
        settings: its limits.
        vocabulary: how many tokens its graph knows.
        tokenizer: between text and tokens; None: clients send and get ids.
        streams: whether a request can be answered in parts.
    """

    model: str
    settings: GenerationSettings
    vocabulary: int
    tokenizer: Tokenizer | None
    streams: bool

    def read(self, request: InferRequest) -> GenerationRequest:
        """Check a request.

        Raises:
            InvalidArgumentError: an input, parameter or requested output is unknown or has a value that can't
                be, the prompt is empty or too long, or it and what is to follow it are.
            UnsupportedError: an output is to go to shared memory.
        """
        if self.streams and len(request.id) > LONGEST_ID:
            raise InvalidArgumentError(
                f"the request's id has {len(request.id)} characters, expected {LONGEST_ID} at most: it is "
                "in each token's answer"
            )
        tensors = self._tensors(request)
        values = values_of(tensors, request.parameters)
        outputs = self._outputs(request, values, text=TEXT_INPUT in tensors)
        stream = values.get("stream", False)
        if stream and not self.streams:
            raise InvalidArgumentError(
                f"model '{self.model}' answers each request once: leave 'stream' out, or ask a model whose "
                "transaction policy is decoupled"
            )
        exclude = _exclude_input(values, stream=stream, text=TEXT_INPUT in tensors)
        sampling = SamplingParameters(**{name: values[name] for name in _SAMPLING_FIELDS if name in values})
        stops = self._stops(values)
        text = one_text(tensors[TEXT_INPUT]) if TEXT_INPUT in tensors else None
        ids = self._prompt(tensors, text, values.get("max_tokens", 1))
        room = self.settings.context_length - len(ids)
        max_tokens = values.get("max_tokens", min(self.settings.default_max_tokens, room))
        if sampling.min_tokens > max_tokens:
            raise InvalidArgumentError(
                f"'min_tokens' is {sampling.min_tokens}, expected {max_tokens} at most, as 'max_tokens'"
            )
        return GenerationRequest(
            ids,
            text,
            max_tokens,
            sampling,
            stops,
            values.get("include_stop_str_in_output", False),
            stream,
            values.get("ignore_eos", False),
            exclude,
            outputs,
        )

    def _tensors(self, request: InferRequest) -> dict[str, Tensor]:
        """The inputs by name."""
        known = input_specs(has_tokenizer=self.tokenizer is not None)
        for tensor in request.inputs:
            if tensor.name not in known:
                raise InvalidArgumentError(
                    f"unexpected inference input '{tensor.name}' for model '{self.model}', it has "
                    f"{list(known)}{self._without_text}"
                )
        tensors = {tensor.name: tensor for tensor in request.inputs}
        if len(tensors) != len(request.inputs):
            names = [tensor.name for tensor in request.inputs]
            raise InvalidArgumentError(f"model '{self.model}' expects each input once, got {names}")
        if (TEXT_INPUT in tensors) == (INPUT_IDS in tensors):
            prompt = INPUT_IDS if self.tokenizer is None else f"either {TEXT_INPUT} or {INPUT_IDS}"
            raise InvalidArgumentError(
                f"model '{self.model}' expects its prompt in {prompt}, got {list(tensors)}"
                f"{self._without_text}"
            )
        return tensors

    @property
    def _without_text(self) -> str:
        return "" if self.tokenizer else ": it has no tokenizer, so that it takes and gives token ids only"

    def _outputs(self, request: InferRequest, values: Mapping[str, Any], *, text: bool) -> tuple[str, ...]:
        """The outputs to answer: those that are named, else the text or the ids and what `return_` asks."""
        known = output_specs(has_tokenizer=self.tokenizer is not None)
        wanted = {TEXT_OUTPUT if text else OUTPUT_IDS}
        for name in (FINISH_REASON, NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS):
            if values.get(f"return_{name}"):
                wanted.add(name)
        if request.outputs:
            wanted = {output.name for output in request.outputs}
        for output in request.outputs:
            if output.name not in known:
                raise InvalidArgumentError(
                    f"unexpected inference output '{output.name}' for model '{self.model}', it has "
                    f"{list(known)}{self._without_text}"
                )
            if output.classification:
                raise InvalidArgumentError(
                    f"output '{output.name}': classification needs a class score for each element, and "
                    f"'{self.model}' generates tokens: leave it out"
                )
            if output.shared_memory is not None:
                raise UnsupportedError(
                    f"output '{output.name}': what a generation model answers has no size to reserve shared "
                    "memory for: take it in the message"
                )
        return tuple(name for name in known if name in wanted)

    def _prompt(self, tensors: Mapping[str, Tensor], text: str | None, wanted: int) -> list[int]:
        """The prompt's tokens, which leave room for as many as are wanted."""
        limits = self.settings
        most = min(limits.max_prompt_length, limits.context_length - 1)
        if text is None:
            count = tensors[INPUT_IDS].array.size
            ids = token_ids(tensors[INPUT_IDS], self.vocabulary, most + 1)
        else:
            ids = self._encode(text, most)
            count = len(ids)
        if not count:
            raise InvalidArgumentError("the prompt is empty: expected one token or more")
        if count > most:
            raise InvalidArgumentError(
                f"the prompt has {count} tokens, expected {most} at most (max_prompt_length): shorten it"
            )
        if count + wanted > limits.context_length:
            raise InvalidArgumentError(
                f"the prompt has {count} tokens and 'max_tokens' is {wanted}, together {count + wanted}, "
                f"expected {limits.context_length} at most (context_length): shorten the prompt, or ask for "
                f"{limits.context_length - count} tokens at most"
            )
        return ids

    def _encode(self, text: str, most: int) -> list[int]:
        """A text's tokens, unless it is so long that it can't be `most` of them."""
        tokenizer = self.tokenizer
        assert tokenizer is not None, "input_specs has no text_input without one"
        size = len(text.encode())
        if size > most * tokenizer.longest_token_bytes:
            least = size // tokenizer.longest_token_bytes
            raise InvalidArgumentError(
                f"the prompt has {least} tokens or more (max_prompt_length), expected {most} at most: "
                "shorten it"
            )
        if tokenizer.exceeds(text, most):
            raise InvalidArgumentError(
                f"the prompt has more than {most} tokens (max_prompt_length), expected {most} at most: "
                "shorten it"
            )
        ids = tokenizer.encode(text)
        if ids and max(ids) >= self.vocabulary:
            raise InvalidArgumentError(
                f"the prompt has the token {max(ids)}, which the tokenizer knows, but not the graph, "
                f"with its vocabulary of {self.vocabulary}: the two don't belong together"
            )
        return ids

    def _stops(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        stops: tuple[str, ...] = values.get("stop", ())
        if stops and self.tokenizer is None:
            raise InvalidArgumentError(f"'stop' is a text{self._without_text}")
        return stops


def _exclude_input(values: Mapping[str, Any], *, stream: bool, text: bool) -> bool:
    """Whether the answer leaves the prompt out, by the rules of Triton's vLLM backend.

    Answered all together, a text has its prompt in front unless the request says no; streamed, it can't.
    """
    exclude: bool = values.get("exclude_input_in_output", stream or not text)
    if not exclude and stream:
        raise InvalidArgumentError("when streaming, 'exclude_input_in_output' = false is not allowed")
    if not exclude and not text:
        raise InvalidArgumentError(
            f"'exclude_input_in_output' = false needs the prompt in '{TEXT_INPUT}': ids are answered without "
            "the prompt's"
        )
    return exclude
